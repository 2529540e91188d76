// SPDX-License-Identifier: Apache-2.0
// What deciding and pruning cost on a device, against reading the keys in alternating runs.
//
// A row is work/model/how: all layers of a model in one batch, or one after the other, each call by
// itself or all of them in a graph, and what else is another way. Times are between events of the
// stream; before each, the second level cache is overwritten. `limit` is the bandwidth of a kernel
// that only reads the keys.
#include <benchmark/benchmark.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
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
template <class T>
__global__ void fill(T* data, index_t count, float scale) {
  for (index_t i = blockIdx.x * index_t{blockDim.x} + threadIdx.x; i < count;
       i += index_t{gridDim.x} * blockDim.x) {
    std::uint64_t x = static_cast<std::uint64_t>(i) * 0x9E3779B97F4A7C15u + 0xD1B54A32D192ED03u;
    x ^= x >> 32;
    x *= 0xBF58476D1CE4E5B9u;
    const auto noise = static_cast<float>(static_cast<std::int32_t>(x >> 32)) * 0x1p-31f;
    data[i] = static_cast<T>(scale * noise);
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

/// A batch of prompts of one length, of all layers of a model.
struct batch_shape {
  geometry of;
  index_t tokens, capacity, batch;

  index_t rows_of_layer(index_t row_tokens) const { return batch * of.kv_heads * row_tokens; }
  index_t rows(index_t row_tokens) const { return of.layers * rows_of_layer(row_tokens); }
};

/// A source for each layer, and all of them as one.
template <class Source>
class layer_table {
 public:
  explicit layer_table(std::vector<Source> layers)
      : layers_(std::move(layers)), there_(static_cast<index_t>(layers_.size())) {
    there_.upload(layers_);
  }
  const Source& layer(index_t l) const { return layers_[static_cast<std::size_t>(l)]; }
  layered<Source> batched() const {
    return {view<const Source, 1, device>(there_.data(), {there_.count()}), layers_[0]};
  }

 private:
  std::vector<Source> layers_;
  device_array<Source> there_;
};

/// Rows of `columns` numbers: [layer, sequence, kv_head, capacity].
template <class T>
class dense_layers {
 public:
  dense_layers(const batch_shape& s, lengths_view<device> lengths, index_t columns, float scale)
      : elements_(s.rows(s.capacity) * columns), table_(layers(s, lengths, columns)) {
    fill<<<4096, 256>>>(elements_.data(), elements_.count(), scale);
  }
  static index_t row_bytes(const geometry& g) { return g.head_dim * index_t{sizeof(T)}; }
  auto layer(index_t l) const { return table_.layer(l); }
  auto batched() const { return table_.batched(); }
  const void* data() const { return elements_.data(); }

 private:
  using source = dense<T, device>;

  std::vector<source> layers(const batch_shape& s, lengths_view<device> lengths,
                             index_t columns) const {
    std::vector<source> all;
    for (index_t l = 0; l < s.of.layers; ++l) {
      T* const first = elements_.data() + l * s.rows_of_layer(s.capacity) * columns;
      all.emplace_back(view<T, 4, device>(first, {s.batch, s.of.kv_heads, s.capacity, columns}),
                       lengths);
    }
    return all;
  }

  device_array<T> elements_;
  layer_table<source> table_;
};

/// 8 bits a number, and a scale for each token, noise as well.
class fp8_layers {
 public:
  fp8_layers(const batch_shape& s, lengths_view<device> lengths, index_t columns, float scale)
      : rows_(s, lengths, columns, scale), scales_(s, lengths, 1, 1) {}
  static index_t row_bytes(const geometry& g) { return g.head_dim; }
  auto layer(index_t l) const { return scaled_keys(rows_.layer(l), scales_.layer(l)); }
  auto batched() const { return scaled_keys(rows_.batched(), scales_.batched()); }
  const void* data() const { return rows_.data(); }

 private:
  dense_layers<__nv_fp8_e4m3> rows_;
  dense_layers<float> scales_;
};

/// Pages of 16 tokens, in random order; one table for all layers, whose pools are apart.
class paged_layers {
 public:
  paged_layers(const batch_shape& s, lengths_view<device> lengths, index_t columns, float scale)
      : pages_((s.capacity + page_tokens - 1) / page_tokens * s.batch),
        elements_(s.of.layers * pages_ * s.of.kv_heads * page_tokens * columns),
        ids_(pages_),
        table_(layers(s, lengths, columns)) {
    std::vector<std::int32_t> ids(static_cast<std::size_t>(pages_));
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), std::mt19937(1));
    ids_.upload(ids);
    fill<<<4096, 256>>>(elements_.data(), elements_.count(), scale);
  }
  static index_t row_bytes(const geometry& g) { return g.head_dim * index_t{sizeof(element)}; }
  auto layer(index_t l) const { return table_.layer(l); }
  auto batched() const { return table_.batched(); }
  const void* data() const { return elements_.data(); }

 private:
  static constexpr index_t page_tokens = 16;
  using source = paged<element, std::int32_t, device>;

  std::vector<source> layers(const batch_shape& s, lengths_view<device> lengths,
                             index_t columns) const {
    std::vector<source> all;
    const auto table = page_table<std::int32_t, device>::padded(
        view<const std::int32_t, 2, device>(ids_.data(), {s.batch, pages_ / s.batch}), lengths);
    for (index_t l = 0; l < s.of.layers; ++l) {
      element* const first = elements_.data() + l * (elements_.count() / s.of.layers);
      all.emplace_back(
          view<element, 4, device>(first, {pages_, s.of.kv_heads, page_tokens, columns}), table);
    }
    return all;
  }

  index_t pages_;
  device_array<element> elements_;
  device_array<std::int32_t> ids_;
  layer_table<source> table_;
};

/// All layers of a model after the prefill, with the last `window` queries. Values are keys' twins.
template <class Cache>
class model {
 public:
  model(const batch_shape& s, index_t window, bool with_values)
      : shape_(s),
        window_(window),
        lengths_(s.batch),
        keys_(s, lengths(), s.of.head_dim, 1.7f),
        queries_(s.of.layers * s.batch * window * s.of.q_heads * s.of.head_dim),
        kept_(s.of.layers * s.batch) {
    lengths_.upload(std::vector<position_t>(static_cast<std::size_t>(s.batch),
                                            static_cast<position_t>(s.tokens)));
    if (with_values) values_ = std::make_unique<Cache>(s, lengths(), s.of.head_dim, 1.0f);
    fill<<<64, 256>>>(queries_.data(), queries_.count(), 1);
    check(cudaGetLastError());
    check(cudaDeviceSynchronize());
  }

  /// Of keys and values as the device holds them.
  static std::size_t bytes(const batch_shape& s, bool with_values) {
    const index_t rows = s.rows(s.capacity);
    return static_cast<std::size_t>(rows * Cache::row_bytes(s.of) * (with_values ? 2 : 1));
  }
  /// Of the keys that there are. They are read where the limit is measured: as many, from the
  /// first.
  index_t key_bytes() const { return shape_.rows(shape_.tokens) * Cache::row_bytes(shape_.of); }
  const uint4* keys() const { return static_cast<const uint4*>(keys_.data()); }

  /// Calls f(layer, values, kept) for all layers in one batch.
  template <class F>
  void batched(const F& f) const {
    // All are measured, those that would stay whole as well.
    f(observe(queries(0, shape_.of.layers), keys_.batched(), {.index = 2}),
      (values_ ? *values_ : keys_).batched(), cuts(0, shape_.of.layers));
  }
  /// The same for each layer by itself.
  template <class F>
  void one_by_one(const F& f) const {
    for (index_t l = 0; l < shape_.of.layers; ++l) {
      f(observe(queries(l, 1), keys_.layer(l), {.index = 2}), (values_ ? *values_ : keys_).layer(l),
        cuts(l, 1));
    }
  }

 private:
  lengths_view<device> lengths() const { return {lengths_.data(), {shape_.batch}}; }
  view<const element, 4, device> queries(index_t first, index_t count) const {
    return {queries_.data() + first * (queries_.count() / shape_.of.layers),
            {count * shape_.batch, window_, shape_.of.q_heads, shape_.of.head_dim}};
  }
  kept_ranges<device> cuts(index_t first, index_t count) const {
    return {kept_.data() + first * shape_.batch, {count * shape_.batch, 1}};
  }

  batch_shape shape_;
  index_t window_;
  device_array<position_t> lengths_;
  Cache keys_;
  std::unique_ptr<Cache> values_;
  device_array<element> queries_;
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
enum class layout { dense, fp8, paged };

/// How the work is done: the end of a row's name says what is not as in the first rows.
struct way {
  std::string name;
  bool in_batch = true, in_graph = false;
  layout keys = layout::dense;
  count_t window = 1;
  row_average average = row_average::mean;
  index_t capacity = 0;  // or as many as there are tokens
  bool one_layer = false;
};

/// One of the verbs on all layers, against reading all keys.
template <class Cache>
void measure(benchmark::State& state, const geometry& g, work verb, const way& setup) {
  const index_t tokens = state.range(0), batch = state.range(1);
  const batch_shape shape{g, tokens, std::max(setup.capacity, tokens), batch};
  const bool with_values = verb != work::select;
  std::size_t available = 0, total = 0;
  check(cudaMemGetInfo(&available, &total));
  const std::size_t needed = model<Cache>::bytes(shape, with_values);
  if (needed + (std::size_t{2} << 30) > available) {
    state.SkipWithError("the caches do not fit into the device's memory");
    return;
  }
  const model<Cache> caches(shape, setup.window, with_values);
  timer clock;
  const cuda_backend exec{clock.stream()};
  const policy::refreekv policy{.window = setup.window, .average = setup.average};
  const auto for_all = [&](const auto& f) {
    if (setup.in_batch) {
      caches.batched(f);
    } else {
      caches.one_by_one(f);
    }
  };
  std::size_t scratch_bytes = 0;
  for_all([&](const auto& layer, const auto&, const auto&) {
    scratch_bytes = workspace_size(policy, exec, layer);
  });
  const device_array<std::byte> memory(static_cast<index_t>(scratch_bytes));
  const workspace<device> scratch{memory.data(), scratch_bytes};
  const auto run = [&](work step) {
    for_all([&](const auto& layer, const auto& values, const auto& kept) {
      if (step == work::select) check(select(policy, exec, layer, kept, scratch));
      if constexpr (kv_source<std::remove_cvref_t<decltype(values)>>) {
        constexpr auto up = compaction::sinks_up;
        if (step == work::compact) check(compact(exec, kept, up, layer.keys, values));
        if (step == work::prune) check(prune(policy, exec, layer, kept, scratch, up, values));
      }
    });
  };
  run(work::select);  // compact needs cuts
  run(verb);          // and a graph code that is loaded
  std::function<void()> launch = [&] { run(verb); };
  std::unique_ptr<graph> captured;
  if (setup.in_graph) {
    captured = std::make_unique<graph>(clock.stream(), launch);
    launch = [&] { (*captured)(); };
  }

  device_array<unsigned> sink(1);
  const auto read_keys = [&] {
    read<<<2048, 256, 0, clock.stream()>>>(caches.keys(), caches.key_bytes() / 16, sink.data());
  };
  std::vector<double> times, limits;
  for (auto _ : state) {
    limits.push_back(clock.seconds(read_keys));
    times.push_back(clock.seconds(launch));
    state.SetIterationTime(times.back());
  }
  check(cudaGetLastError());
  const double time = median(times), limit = median(limits);
  const double gigabytes = static_cast<double>(caches.key_bytes()) * 1e-9;
  state.counters["ms"] = time * 1e3;
  state.counters["limit_ms"] = limit * 1e3;
  state.counters["limit_GB/s"] = gigabytes / limit;
  state.counters["of_limit"] = limit / time;
  if (verb != work::compact) state.counters["GB/s"] = gigabytes / time;
  state.counters["workspace"] =
      static_cast<double>(scratch_bytes) / static_cast<double>(2 * caches.key_bytes());
}

void measure(benchmark::State& state, const geometry& g, work verb, const way& setup) {
  switch (setup.keys) {
    case layout::dense: return measure<dense_layers<element>>(state, g, verb, setup);
    case layout::fp8: return measure<fp8_layers>(state, g, verb, setup);
    case layout::paged: return measure<paged_layers>(state, g, verb, setup);
  }
}

void add(geometry g, work verb, const way& setup, const std::vector<std::int64_t>& tokens,
         const std::vector<std::int64_t>& batches) {
  const char* const names[] = {"select", "compact", "prune"};
  const std::string row = std::string("cuda/") + names[static_cast<int>(verb)] + "/" + g.name +
                          "/" + setup.name + (setup.in_graph ? "_graph" : "");
  if (setup.one_layer) g.layers = 1;
  benchmark::RegisterBenchmark(row.c_str(),
                               [=](benchmark::State& state) {
                                 try {
                                   measure(state, g, verb, setup);
                                 } catch (const std::exception& e) {
                                   state.SkipWithError(e.what());
                                 }
                               })
      ->ArgNames({"tokens", "batch"})
      ->ArgsProduct({tokens, batches})
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

void add_rows() {
  for (const geometry& g : {geometries[0], geometries[1]}) {
    for (const bool in_batch : {true, false}) {
      for (const bool in_graph : {false, true}) {
        for (const work verb : {work::select, work::compact, work::prune}) {
          add(g, verb, {in_batch ? "batched" : "one_by_one", in_batch, in_graph},
              {1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072}, {1, 16, 64});
        }
      }
    }
  }
  const geometry& g = geometries[0];
  for (const bool in_graph : {false, true}) {
    // What an engine calls that prunes a layer before the next one has a cache.
    add(g, work::select,
        {.name = "one_layer", .in_batch = false, .in_graph = in_graph, .one_layer = true},
        {8192, 131072}, {1, 16});
  }
  add(g, work::select, {.name = "batched_window16", .window = 16}, {8192}, {1});
  add(g, work::select,
      {.name = "batched_window16_frobenius", .window = 16, .average = row_average::frobenius},
      {8192}, {1});
  add(g, work::select, {.name = "batched_fp8", .keys = layout::fp8}, {8192, 131072}, {1});
  for (const work verb : {work::select, work::prune}) {
    add(g, verb, {.name = "batched_paged16", .keys = layout::paged}, {8192, 131072}, {1});
  }
  for (const bool in_batch : {true, false}) {
    add(g, work::select,
        {.name = in_batch ? "batched_capacity131072" : "one_layer_capacity131072",
         .in_batch = in_batch,
         .capacity = 131072,
         .one_layer = !in_batch},
        {8192}, {1});
  }
}

/// What the times depend on besides this library.
void describe_device() {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0));
  benchmark::AddCustomContext("device", properties.name);
  const auto add_attribute = [](const char* name, cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, 0));
    benchmark::AddCustomContext(name, std::to_string(value));
  };
  add_attribute("multiprocessors", cudaDevAttrMultiProcessorCount);
  add_attribute("multiprocessor_clock_kHz", cudaDevAttrClockRate);
  add_attribute("memory_clock_kHz", cudaDevAttrMemoryClockRate);
  add_attribute("second_level_cache_bytes", cudaDevAttrL2CacheSize);
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver));
  check(cudaRuntimeGetVersion(&runtime));
  benchmark::AddCustomContext("cuda_driver", std::to_string(driver));
  benchmark::AddCustomContext("cuda_runtime", std::to_string(runtime));
}

}  // namespace

/// Returns 77 where there is no device.
int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no CUDA device: nothing was measured");
    return 77;
  }
  describe_device();
  add_rows();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
