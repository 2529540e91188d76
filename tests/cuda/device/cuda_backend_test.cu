// SPDX-License-Identifier: Apache-2.0
// The CUDA backend as an engine uses it: memory of the device, streams and graphs.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <deque>

#include "layouts.hpp"
#include "ranked_selection.hpp"
#include "refreekv/cuda.cuh"
#include "selection.hpp"

using namespace refreekv;

namespace {

using device = device_memory;

/// An array on the device.
template <class T>
class device_array {
 public:
  explicit device_array(std::size_t count) : count_(count) {
    REQUIRE(cudaMalloc(&data_, count * sizeof(T) + 1) == cudaSuccess);
    REQUIRE(cudaMemset(data_, 0xA5, count * sizeof(T)) == cudaSuccess);
  }
  explicit device_array(const std::vector<T>& from) : device_array(from.size()) { upload(from); }
  device_array(const device_array&) = delete;
  device_array& operator=(const device_array&) = delete;
  ~device_array() { cudaFree(data_); }

  void upload(const std::vector<T>& from) {
    REQUIRE(from.size() <= count_);
    REQUIRE(cudaMemcpy(data_, from.data(), from.size() * sizeof(T), cudaMemcpyDefault) ==
            cudaSuccess);
  }
  std::vector<T> download() const {
    std::vector<T> to(count_);
    REQUIRE(cudaMemcpy(to.data(), data_, count_ * sizeof(T), cudaMemcpyDefault) == cudaSuccess);
    return to;
  }
  T* data() const { return data_; }
  workspace<device> as_workspace() const
    requires std::same_as<T, std::byte>
  {
    return {data_, count_};
  }

 private:
  T* data_ = nullptr;
  std::size_t count_;
};

class stream {
 public:
  stream() { REQUIRE(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking) == cudaSuccess); }
  stream(const stream&) = delete;
  stream& operator=(const stream&) = delete;
  ~stream() { cudaStreamDestroy(stream_); }
  cudaStream_t get() const { return stream_; }
  void wait() const { REQUIRE(cudaStreamSynchronize(stream_) == cudaSuccess); }

 private:
  cudaStream_t stream_ = nullptr;
};

/// What the device's element is to the CPU.
template <class T>
struct host_element;
template <>
struct host_element<float> {
  using type = float;
};
template <>
struct host_element<__half> {
  using type = f16_bits;
};
template <>
struct host_element<__nv_bfloat16> {
  using type = bf16_bits;
};

template <class T>
T make(float x) {
  if constexpr (std::same_as<T, float>) return x;
  if constexpr (std::same_as<T, __half>) return __float2half(x);
  if constexpr (std::same_as<T, __nv_bfloat16>) return __float2bfloat16(x);
}

/// One layer of one length on the host, as elements: keys [kv_head, capacity, head_dim].
template <class T>
struct layer {
  index_t kv_heads, group, dim, capacity, window;
  std::vector<T> keys, queries;

  layer(unsigned seed, index_t tokens, index_t rows = 1, index_t heads = 2, index_t of_head = 4,
        index_t head_dim = 128)
      : kv_heads(heads), group(of_head), dim(head_dim), capacity(tokens), window(rows) {
    problem p(heads, of_head, head_dim, rows, {static_cast<position_t>(tokens)});
    random_source random(seed);
    fill(p, random);
    for (const float x : p.keys.values[0]) keys.push_back(make<T>(x));
    for (const float x : p.queries) queries.push_back(make<T>(x));
  }

  /// Both of the first `tokens` tokens.
  template <class Memory, class Element>
  auto seen(Element* key, const Element* query, const position_t* tokens,
            index_t number = 5) const {
    const dense<Element, Memory> source(view<Element, 4, Memory>(key, {1, kv_heads, capacity, dim}),
                                        lengths_view<Memory>(tokens, {1}));
    return observe(view<const Element, 4, Memory>(query, {1, window, kv_heads * group, dim}),
                   source, {.layer = number});
  }

  template <class Rule>
  auto on_cpu(const Rule& rule, position_t tokens) {
    using element = typename host_element<T>::type;
    const auto what = seen<host_memory>(reinterpret_cast<element*>(keys.data()),
                                        reinterpret_cast<const element*>(queries.data()), &tokens);
    const cpu_backend on;
    std::vector<std::byte> scratch(workspace_size(rule, on, what));
    if constexpr (std::same_as<decision_of<Rule, host_memory>, kept_ranges<>>) {
      std::vector<kept_range> kept(size(groups_of(rule, what)));
      REQUIRE(select(rule, on, what, {kept.data(), {1, groups_of(rule, what)}}, scratch) ==
              status::ok);
      return kept;
    } else {
      std::vector<position_t> positions(size(kv_heads * capacity));
      std::vector<kept_count> counts(size(kv_heads));
      const kept_positions<> kept{{positions.data(), {1, kv_heads, capacity}},
                                  {counts.data(), {1, kv_heads}}};
      REQUIRE(select(rule, on, what, kept, scratch) == status::ok);
      std::vector<std::vector<position_t>> out;
      for (index_t h = 0; h < kv_heads; ++h) out.push_back(positions_of(kept, 0, h));
      return out;
    }
  }
};

}  // namespace

TEMPLATE_TEST_CASE("a device decides as the CPU does", "[cuda]", float, __half, __nv_bfloat16) {
  const stream s;
  const cuda_backend on{s.get()};
  const index_t window = GENERATE(index_t{1}, index_t{16});
  layer<TestType> l(base_seed(), 3000, window);
  const device_array<TestType> keys(l.keys), queries(l.queries);
  device_array<position_t> length(1);
  for (const position_t tokens : {0, 1, 4, 5, 260, 261, 1999, 3000}) {
    INFO("tokens " << tokens << " window " << window);
    length.upload({tokens});
    const auto seen = l.template seen<device, TestType>(keys.data(), queries.data(), length.data());
    const auto rows = static_cast<count_t>(window);
    for (const policy::refreekv& rule :
         {policy::refreekv{.window = rows}, policy::refreekv{.threshold = 0.1,
                                                             .window = rows,
                                                             .average = row_average::frobenius,
                                                             .scope = cut_scope::kv_head}}) {
      const device_array<kept_range> kept(size(groups_of(rule, seen)));
      const device_array<std::byte> scratch(workspace_size(rule, on, seen));
      REQUIRE(select(rule, on, seen, {kept.data(), {1, groups_of(rule, seen)}},
                     scratch.as_workspace()) == status::ok);
      s.wait();
      const std::vector<kept_range> got = kept.download(), expected = l.on_cpu(rule, tokens);
      for (std::size_t i = 0; i < expected.size(); ++i) CHECK(got[i].cut == expected[i].cut);
    }
    const policy::snapkv rule{.budget = 500, .window = rows};
    const device_array<position_t> positions(size(l.kv_heads * l.capacity));
    const device_array<kept_count> counts(size(l.kv_heads));
    const device_array<std::byte> scratch(workspace_size(rule, on, seen));
    REQUIRE(select(rule, on, seen,
                   kept_positions<device>{{positions.data(), {1, l.kv_heads, l.capacity}},
                                          {counts.data(), {1, l.kv_heads}}},
                   scratch.as_workspace()) == status::ok);
    s.wait();
    const auto expected = l.on_cpu(rule, tokens);
    const std::vector<position_t> got = positions.download();
    const std::vector<kept_count> count = counts.download();
    for (index_t h = 0; h < l.kv_heads; ++h) {
      const auto first = got.begin() + h * l.capacity;
      CHECK(std::vector(first, first + count[size(h)].count) == expected[size(h)]);
    }
  }
}

TEST_CASE("one graph serves prompts of every length", "[cuda]") {
  const stream s;
  const cuda_backend on{s.get()};
  layer<__nv_bfloat16> l(base_seed() + 1, 2500);
  device_array<__nv_bfloat16> keys(l.keys);
  const device_array<__nv_bfloat16> queries(l.queries);
  device_array<position_t> length(1);
  const auto seen = l.seen<device, __nv_bfloat16>(keys.data(), queries.data(), length.data());
  const policy::refreekv rule;
  const device_array<kept_range> kept(1);
  const device_array<std::byte> scratch(workspace_size(rule, on, seen));

  cudaGraph_t graph;
  cudaGraphExec_t captured;
  REQUIRE(cudaStreamBeginCapture(s.get(), cudaStreamCaptureModeGlobal) == cudaSuccess);
  const status pruned =
      prune(rule, on, seen, {kept.data(), {1, 1}}, scratch.as_workspace(), compaction::sinks_up);
  REQUIRE(cudaStreamEndCapture(s.get(), &graph) == cudaSuccess);
  REQUIRE(pruned == status::ok);
  REQUIRE(cudaGraphInstantiate(&captured, graph, 0) == cudaSuccess);
  for (const position_t tokens : {2500, 5, 1777, 0, 300}) {
    INFO("tokens " << tokens);
    keys.upload(l.keys);
    length.upload({tokens});
    REQUIRE(cudaGraphLaunch(captured, s.get()) == cudaSuccess);
    s.wait();
    const kept_range expected = l.on_cpu(rule, tokens).at(0), got = kept.download().at(0);
    CHECK(got.cut == expected.cut);
    std::vector<__nv_bfloat16> moved = l.keys;
    const dense<__nv_bfloat16> source(
        view<__nv_bfloat16, 4>(moved.data(), {1, l.kv_heads, l.capacity, l.dim}), {&tokens, {1}});
    REQUIRE(compact(cpu_backend{}, view<const kept_range, 2>(&got, {1, 1}), compaction::sinks_up,
                    source) == status::ok);
    const std::vector<__nv_bfloat16> there = keys.download();
    CHECK(std::memcmp(there.data(), moved.data(), moved.size() * sizeof moved[0]) == 0);
  }
  cudaGraphExecDestroy(captured);
  cudaGraphDestroy(graph);
}

TEST_CASE("layers in one batch decide as each does alone", "[cuda]") {
  const stream s;
  const cuda_backend on{s.get()};
  using element = __half;
  constexpr index_t count = 5, tokens = 1500;
  std::vector<layer<element>> layers;
  std::deque<device_array<element>> keys;
  std::vector<dense<element, device>> sources;
  std::vector<element> queries;
  const device_array<position_t> length(std::vector<position_t>{tokens});
  for (unsigned l = 0; l < count; ++l) {
    layers.emplace_back(base_seed() + l, tokens);
    keys.emplace_back(layers.back().keys);
    sources.push_back(
        layers.back().seen<device, element>(keys.back().data(), nullptr, length.data()).keys);
    queries.insert(queries.end(), layers.back().queries.begin(), layers.back().queries.end());
  }
  const device_array<dense<element, device>> table(sources);
  const device_array<element> rows(queries);
  const auto seen = observe(
      view<const element, 4, device>(rows.data(), {count, 1, 8, 128}),
      layered(view<const dense<element, device>, 1, device>(table.data(), {count}), sources[0]),
      {.layer = 2});
  const policy::refreekv rule;
  const device_array<kept_range> kept(count);
  const device_array<std::byte> scratch(workspace_size(rule, on, seen));
  REQUIRE(select(rule, on, seen, {kept.data(), {count, 1}}, scratch.as_workspace()) == status::ok);
  s.wait();
  const std::vector<kept_range> got = kept.download();
  for (index_t l = 0; l < count; ++l) {
    CHECK(got[size(l)].cut == layers[size(l)].on_cpu(rule, tokens).at(0).cut);
  }
}

TEST_CASE("a launch that is refused is a device error", "[cuda]") {
  const stream s;
  layer<__half> l(base_seed() + 2, 300);
  const device_array<__half> keys(l.keys), queries(l.queries);
  const device_array<position_t> length(std::vector<position_t>{300});
  const auto seen = l.seen<device, __half>(keys.data(), queries.data(), length.data());
  const policy::refreekv rule;
  const cuda_backend on{s.get()};
  const device_array<kept_range> kept(1);
  const device_array<std::byte> scratch(workspace_size(rule, on, seen));
  // Waiting for a stream ends its capture, and what follows is refused.
  REQUIRE(cudaStreamBeginCapture(s.get(), cudaStreamCaptureModeRelaxed) == cudaSuccess);
  REQUIRE(cudaStreamSynchronize(s.get()) != cudaSuccess);
  CHECK(select(rule, on, seen, {kept.data(), {1, 1}}, scratch.as_workspace()) ==
        status::device_error);
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(s.get(), &graph);
  cudaGetLastError();
  CHECK(select(rule, on, seen, {kept.data(), {1, 1}}, scratch.as_workspace()) == status::ok);
  s.wait();
}
