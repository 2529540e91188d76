// SPDX-License-Identifier: Apache-2.0
// What deciding and pruning cost on a device, against reading the keys in alternating runs.
//
// A row is work/model/how: all layers of a model in one batch, or one after the other, each call by
// itself or all of them in a graph. Times are between events of the stream; before each, the second
// level cache is overwritten. `limit` is the bandwidth of a kernel that only reads the keys.
#include <benchmark/benchmark.h>
#include <cuda_bf16.h>

#include <array>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "geometry.hpp"
#include "median.hpp"
#include "refreekv/cuda.cuh"

namespace {

using namespace bench;
using namespace refreekv;
using device = device_memory;
using element = __nv_bfloat16;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
void check(status s) {
  if (s != status::ok) throw std::runtime_error(to_string(s));
}

template <class T>
class device_array {
 public:
  explicit device_array(index_t count) : count_(count) {
    check(cudaMalloc(&data_, static_cast<std::size_t>(count) * sizeof(T) + 1));
  }
  device_array(const device_array&) = delete;
  device_array& operator=(const device_array&) = delete;
  ~device_array() { cudaFree(data_); }

  void upload(const std::vector<T>& from) {
    check(cudaMemcpy(data_, from.data(), from.size() * sizeof(T), cudaMemcpyDefault));
  }
  T* data() const { return data_; }
  index_t count() const { return count_; }
  std::size_t bytes() const { return static_cast<std::size_t>(count_) * sizeof(T); }

 private:
  T* data_ = nullptr;
  index_t count_;
};

/// Noise: attention is spread out, so about 2 % are dropped and what is measured is the decision.
__global__ void fill(element* data, index_t count, float scale) {
  for (index_t i = blockIdx.x * index_t{blockDim.x} + threadIdx.x; i < count;
       i += index_t{gridDim.x} * blockDim.x) {
    std::uint64_t x = static_cast<std::uint64_t>(i) * 0x9E3779B97F4A7C15u + 0xD1B54A32D192ED03u;
    x ^= x >> 32;
    x *= 0xBF58476D1CE4E5B9u;
    const auto noise = static_cast<float>(static_cast<std::int32_t>(x >> 32)) * 0x1p-31f;
    data[i] = __float2bfloat16(scale * noise);
  }
}

/// Reads all of it, 16 bytes at a time, and nothing else.
__global__ void read(const uint4* data, index_t count, unsigned* sink) {
  unsigned bits = 0;
  constexpr int ahead = 4;
  const index_t stride = index_t{gridDim.x} * blockDim.x;
  for (index_t i = blockIdx.x * index_t{blockDim.x} + threadIdx.x; i < count; i += stride * ahead) {
    uint4 x[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      x[k] = i + k * stride < count ? __ldcs(data + i + k * stride) : uint4{};
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) bits ^= x[k].x ^ x[k].y ^ x[k].z ^ x[k].w;
  }
  if (bits == 0x9E3779B9u) *sink = bits;
}

/// All layers of a model after the prefill of a batch of prompts of one length.
class model {
 public:
  model(const geometry& g, index_t tokens, index_t batch, bool with_values)
      : g_(g),
        tokens_(tokens),
        batch_(batch),
        keys_(elements()),
        values_(with_values ? elements() : 0),
        queries_(g.layers * batch * g.q_heads * g.head_dim),
        lengths_(batch),
        key_table_(g.layers),
        value_table_(g.layers),
        kept_(g.layers * batch) {
    fill<<<4096, 256>>>(keys_.data(), keys_.count(), 1.7f);
    if (with_values) fill<<<4096, 256>>>(values_.data(), values_.count(), 1);
    fill<<<64, 256>>>(queries_.data(), queries_.count(), 1);
    check(cudaGetLastError());
    lengths_.upload(
        std::vector<position_t>(static_cast<std::size_t>(batch), static_cast<position_t>(tokens)));
    for (index_t l = 0; l < g.layers; ++l) {
      key_layers_.push_back(source(keys_.data(), l));
      value_layers_.push_back(source(values_.data(), with_values ? l : 0));
    }
    key_table_.upload(key_layers_);
    value_table_.upload(value_layers_);
    check(cudaDeviceSynchronize());
  }

  static std::size_t bytes(const geometry& g, index_t tokens, index_t batch, bool with_values) {
    const index_t elements = g.layers * batch * g.kv_heads * tokens * g.head_dim;
    return static_cast<std::size_t>(elements) * sizeof(element) * (with_values ? 2 : 1);
  }
  const device_array<element>& keys() const { return keys_; }

  /// Calls f(observation, values, kept) for all layers in one batch.
  template <class F>
  void batched(const F& f) const {
    const layered keys(table(key_table_), key_layers_[0]);
    const layered values(table(value_table_), value_layers_[0]);
    // All are measured, those that would stay whole as well.
    f(observe(queries(0, g_.layers), keys, {.layer = 2}), values, cuts(0, g_.layers));
  }
  /// The same for each layer by itself.
  template <class F>
  void one_by_one(const F& f) const {
    for (index_t l = 0; l < g_.layers; ++l) {
      const auto i = static_cast<std::size_t>(l);
      f(observe(queries(l, 1), key_layers_[i], {.layer = 2}), value_layers_[i], cuts(l, 1));
    }
  }

 private:
  using source_type = dense<element, device>;

  index_t elements() const { return g_.layers * batch_ * g_.kv_heads * tokens_ * g_.head_dim; }
  source_type source(element* data, index_t l) const {
    return source_type(view<element, 4, device>(data + l * (elements() / g_.layers),
                                                {batch_, g_.kv_heads, tokens_, g_.head_dim}),
                       lengths_view<device>(lengths_.data(), {batch_}));
  }
  view<const source_type, 1, device> table(const device_array<source_type>& sources) const {
    return {sources.data(), {g_.layers}};
  }
  view<const element, 4, device> queries(index_t first, index_t count) const {
    return {queries_.data() + first * (queries_.count() / g_.layers),
            {count * batch_, 1, g_.q_heads, g_.head_dim}};
  }
  kept_ranges<device> cuts(index_t first, index_t count) const {
    return {kept_.data() + first * batch_, {count * batch_, 1}};
  }

  geometry g_;
  index_t tokens_, batch_;
  device_array<element> keys_, values_, queries_;
  device_array<position_t> lengths_;
  std::vector<source_type> key_layers_, value_layers_;
  device_array<source_type> key_table_, value_table_;
  device_array<kept_range> kept_;
};

/// Times work on one stream, whose second level cache is overwritten before.
class timer {
 public:
  timer() : flushed_(2 * second_level_bytes()) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    check(cudaEventCreate(&start_));
    check(cudaEventCreate(&stop_));
  }
  timer(const timer&) = delete;
  timer& operator=(const timer&) = delete;
  ~timer() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
    cudaStreamDestroy(stream_);
  }

  cudaStream_t stream() const { return stream_; }

  template <class Work>
  double seconds(const Work& work) {
    check(cudaMemsetAsync(flushed_.data(), 0, flushed_.bytes(), stream_));
    check(cudaEventRecord(start_, stream_));
    work();
    check(cudaEventRecord(stop_, stream_));
    check(cudaEventSynchronize(stop_));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start_, stop_));
    return milliseconds * 1e-3;
  }

 private:
  static index_t second_level_bytes() {
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, 0));
    return bytes;
  }
  device_array<std::byte> flushed_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
};

/// Work of a stream that is launched as one graph.
class graph {
 public:
  template <class Work>
  graph(cudaStream_t stream, const Work& work) : stream_(stream) {
    cudaGraph_t captured = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    work();
    check(cudaStreamEndCapture(stream, &captured));
    check(cudaGraphInstantiate(&graph_, captured, 0));
    check(cudaGraphDestroy(captured));
  }
  graph(const graph&) = delete;
  graph& operator=(const graph&) = delete;
  ~graph() { cudaGraphExecDestroy(graph_); }
  void operator()() const { check(cudaGraphLaunch(graph_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
};

enum class work { select, compact, prune };

/// One of the verbs on all layers, against reading all keys.
void measure(benchmark::State& state, const geometry& g, work what, bool in_batch, bool in_graph) {
  const index_t tokens = state.range(0), batch = state.range(1);
  const bool with_values = what != work::select;
  std::size_t available = 0, total = 0;
  check(cudaMemGetInfo(&available, &total));
  const std::size_t needed = model::bytes(g, tokens, batch, with_values);
  if (needed + (std::size_t{2} << 30) > available) {
    state.SkipWithError("the caches do not fit into the device's memory");
    return;
  }
  const model caches(g, tokens, batch, with_values);
  timer clock;
  const cuda_backend on{clock.stream()};
  const policy::refreekv rule;
  const auto for_all = [&](const auto& f) {
    if (in_batch) {
      caches.batched(f);
    } else {
      caches.one_by_one(f);
    }
  };
  std::size_t scratch_bytes = 0;
  for_all([&](const auto& seen, const auto&, const auto&) {
    scratch_bytes = workspace_size(rule, on, seen);
  });
  const device_array<std::byte> memory(static_cast<index_t>(scratch_bytes));
  const workspace<device> scratch{memory.data(), scratch_bytes};
  const auto run = [&](work verb) {
    for_all([&](const auto& seen, const auto& values, const auto& kept) {
      constexpr auto how = compaction::sinks_up;
      if (verb == work::select) check(select(rule, on, seen, kept, scratch));
      if (verb == work::compact) check(compact(on, kept, how, seen.keys, values));
      if (verb == work::prune) check(prune(rule, on, seen, kept, scratch, how, values));
    });
  };
  run(work::select);  // compact needs cuts
  run(what);          // and a graph code that is loaded
  std::function<void()> launch = [&] { run(what); };
  std::unique_ptr<graph> captured;
  if (in_graph) {
    captured = std::make_unique<graph>(clock.stream(), launch);
    launch = [&] { (*captured)(); };
  }

  device_array<unsigned> sink(1);
  const auto read_keys = [&] {
    read<<<2048, 256, 0, clock.stream()>>>(reinterpret_cast<const uint4*>(caches.keys().data()),
                                           static_cast<index_t>(caches.keys().bytes() / 16),
                                           sink.data());
  };
  std::vector<double> times, limits;
  for (auto _ : state) {
    limits.push_back(clock.seconds(read_keys));
    times.push_back(clock.seconds(launch));
    state.SetIterationTime(times.back());
  }
  check(cudaGetLastError());
  const double time = median(times), limit = median(limits);
  const double gigabytes = static_cast<double>(caches.keys().bytes()) * 1e-9;
  state.counters["ms"] = time * 1e3;
  state.counters["limit_ms"] = limit * 1e3;
  state.counters["limit_GB/s"] = gigabytes / limit;
  state.counters["of_limit"] = limit / time;
  if (what != work::compact) state.counters["GB/s"] = gigabytes / time;
  state.counters["workspace"] =
      static_cast<double>(scratch_bytes) / static_cast<double>(2 * caches.keys().bytes());
}

void add(const geometry& g, const char* name, work what, bool in_batch, bool in_graph) {
  const std::string how =
      std::string(in_batch ? "batched" : "one_by_one") + (in_graph ? "_graph" : "");
  const std::string row = std::string("cuda/") + name + "/" + g.name + "/" + how;
  benchmark::RegisterBenchmark(row.c_str(),
                               [=](benchmark::State& state) {
                                 try {
                                   measure(state, g, what, in_batch, in_graph);
                                 } catch (const std::exception& e) {
                                   state.SkipWithError(e.what());
                                 }
                               })
      ->ArgNames({"tokens", "batch"})
      ->ArgsProduct({{1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072}, {1, 16, 64}})
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

}  // namespace

/// Returns 77 where there is no device.
int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no CUDA device: nothing was measured");
    return 77;
  }
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0));
  benchmark::AddCustomContext("device", properties.name);
  for (const geometry& g : {geometries[0], geometries[1]}) {
    for (const bool in_batch : {true, false}) {
      for (const bool in_graph : {false, true}) {
        add(g, "select", work::select, in_batch, in_graph);
        add(g, "compact", work::compact, in_batch, in_graph);
        add(g, "prune", work::prune, in_batch, in_graph);
      }
    }
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
