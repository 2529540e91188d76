// SPDX-License-Identifier: Apache-2.0
// The CUDA backend as an engine uses it: memory of the device, streams and graphs.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <deque>

#include "catch.hpp"
#include "layouts.hpp"
#include "policy_reference.hpp"
#include "refreekv/cuda.cuh"

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
    finish();
  }
  explicit device_array(const std::vector<T>& from) : device_array(from.size()) { upload(from); }
  device_array(const device_array&) = delete;
  device_array& operator=(const device_array&) = delete;
  ~device_array() { cudaFree(data_); }

  void upload(const std::vector<T>& from) {
    REQUIRE(from.size() <= count_);
    REQUIRE(cudaMemcpy(data_, from.data(), from.size() * sizeof(T), cudaMemcpyDefault) ==
            cudaSuccess);
    finish();
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
  /// The calls above return before they are done, and the streams below do not wait for theirs.
  static void finish() { REQUIRE(cudaDeviceSynchronize() == cudaSuccess); }

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

/// One layer of one length: keys [kv_head, capacity, head_dim] as elements, and as the oracle sees
/// them.
template <class T, class Query = T>
struct layer {
  index_t kv_heads, group, dim, capacity, window;
  std::vector<T> keys;
  std::vector<Query> queries;
  problem exact;

  layer(unsigned seed, index_t tokens, index_t rows = 1, index_t heads = 2, index_t of_head = 4,
        index_t head_dim = 128)
      : kv_heads(heads),
        group(of_head),
        dim(head_dim),
        capacity(tokens),
        window(rows),
        exact(heads, of_head, head_dim, rows, {static_cast<position_t>(tokens)}) {
    random_source random(seed);
    fill(exact, random);
    round_to<T>(exact.keys.values[0]);
    round_to<Query>(exact.queries);
    for (const float x : exact.keys.values[0]) keys.push_back(to_element<T>(x));
    for (const float x : exact.queries) queries.push_back(to_element<Query>(x));
  }

  index_t q_heads() const { return kv_heads * group; }

  /// Both, of as many tokens as the device says.
  auto observed(T* key, const Query* query, const position_t* tokens) const {
    return observed(view<T, 4, device>(key, {1, kv_heads, capacity, dim}), query, tokens);
  }
  auto observed(const view<T, 4, device>& rows, const Query* query,
                const position_t* tokens) const {
    return observe(view<const Query, 4, device>(query, {1, window, q_heads(), dim}),
                   dense<T, device>(rows, lengths_view<device>(tokens, {1})), {.index = 5});
  }

  /// Attention of the first `tokens` tokens.
  reference::attention_rows attention(position_t tokens) const {
    problem first = exact;
    first.lengths = {tokens};
    return reference::attend(first, 0);
  }
};

/// Empty, or which of the cuts is not the oracle's, nor one that rounding explains.
std::string disagreement(const std::vector<kept_range>& cuts,
                         const reference::attention_rows& attention,
                         const policy::refreekv& policy) {
  const index_t heads = attention.q_heads / static_cast<index_t>(cuts.size());
  for (std::size_t i = 0; i < cuts.size(); ++i) {
    const index_t first = static_cast<index_t>(i) * heads;
    const std::string why = reference::disagreement(
        cuts[i], reference::decide(attention, first, first + heads, policy), policy.threshold);
    if (!why.empty()) return "cut " + std::to_string(i) + ", " + why;
  }
  return "";
}

/// Work of a stream that is launched as one graph; `error` where the driver refused to capture it.
class graph {
 public:
  template <class Work>
  graph(const stream& s, const Work& work) : stream_(s) {
    REQUIRE(cudaStreamBeginCapture(s.get(), cudaStreamCaptureModeGlobal) == cudaSuccess);
    const status captured = work();
    error = cudaStreamEndCapture(s.get(), &graph_);
    if (error == cudaSuccess) error = cudaGraphInstantiate(&launched_, graph_, 0);
    if (error == cudaSuccess) REQUIRE(captured == status::ok);
    cudaGetLastError();
  }
  graph(const graph&) = delete;
  graph& operator=(const graph&) = delete;
  ~graph() {
    if (launched_ != nullptr) cudaGraphExecDestroy(launched_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
  }
  void launch() const {
    REQUIRE(cudaGraphLaunch(launched_, stream_.get()) == cudaSuccess);
    stream_.wait();
  }

  cudaError_t error;

 private:
  const stream& stream_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t launched_ = nullptr;
};

}  // namespace

TEMPLATE_TEST_CASE("a device decides as the oracle does", "[cuda]", float, __half, __nv_bfloat16) {
  const stream s;
  const cuda_backend exec{s.get()};
  const index_t window = GENERATE(index_t{1}, index_t{16});
  const layer<TestType> l(base_seed(), 3000, window);
  const device_array<TestType> keys(l.keys), queries(l.queries);
  device_array<position_t> length(1);
  for (const position_t tokens : {0, 1, 4, 5, 260, 261, 1999, 3000}) {
    INFO("REFREEKV_SEED=" << base_seed() << " tokens " << tokens << " window " << window);
    length.upload({tokens});
    const auto attention = l.attention(tokens);
    const auto layer = l.observed(keys.data(), queries.data(), length.data());
    const auto rows = static_cast<count_t>(window);
    for (const policy::refreekv& policy :
         {policy::refreekv{.window = rows}, policy::refreekv{.threshold = 0.1,
                                                             .window = rows,
                                                             .average = row_average::frobenius,
                                                             .scope = cut_scope::kv_head}}) {
      const device_array<kept_range> kept(size(groups_of(policy, layer)));
      const device_array<std::byte> scratch(workspace_size(policy, exec, layer));
      REQUIRE(select(policy, exec, layer, {kept.data(), {1, groups_of(policy, layer)}},
                     scratch.as_workspace()) == status::ok);
      s.wait();
      CHECK(disagreement(kept.download(), attention, policy) == "");
    }
    const policy::snapkv policy{.budget = 500, .window = rows};
    const device_array<position_t> positions(size(l.kv_heads * l.capacity));
    const device_array<kept_tokens> counts(size(l.kv_heads));
    const device_array<std::byte> scratch(workspace_size(policy, exec, layer));
    REQUIRE(select(policy, exec, layer,
                   kept_positions<device>{{positions.data(), {1, l.kv_heads, l.capacity}},
                                          {counts.data(), {1, l.kv_heads}}},
                   scratch.as_workspace()) == status::ok);
    s.wait();
    const auto expected = reference::snapkv(attention, l.kv_heads, policy.budget.of(tokens), window,
                                            reference::pool::average, policy.pool.width);
    const std::vector<position_t> got = positions.download();
    const std::vector<kept_tokens> count = counts.download();
    for (index_t h = 0; h < l.kv_heads; ++h) {
      REQUIRE(count[size(h)].count <= tokens);
      const auto first = got.begin() + h * l.capacity;
      CHECK(reference::disagreement({first, first + count[size(h)].count}, expected[size(h)]) ==
            "");
    }
  }
}

TEST_CASE("one graph serves prompts of every length", "[cuda]") {
  using element = __nv_bfloat16;
  const stream s;
  const cuda_backend exec{s.get()};
  const layer<element> l(base_seed() + 1, 2500);
  device_array<element> keys(l.keys);
  const device_array<element> queries(l.queries);
  device_array<position_t> length(std::vector<position_t>{2500});
  const auto layer = l.observed(keys.data(), queries.data(), length.data());
  const policy::refreekv policy;
  const device_array<kept_range> kept(1);
  const device_array<std::byte> scratch(workspace_size(policy, exec, layer));
  const auto pruned = [&] {
    return prune(policy, exec, layer, {kept.data(), {1, 1}}, scratch.as_workspace(),
                 compaction::sinks_up);
  };
  REQUIRE(pruned() == status::ok);  // code is loaded outside of a capture
  s.wait();
  const graph captured(s, pruned);
  REQUIRE(captured.error == cudaSuccess);
  for (const position_t tokens : {2500, 5, 1777, 0, 300}) {
    INFO("REFREEKV_SEED=" << base_seed() << " tokens " << tokens);
    keys.upload(l.keys);
    length.upload({tokens});
    captured.launch();
    const std::vector<kept_range> got = kept.download();
    CHECK(disagreement(got, l.attention(tokens), policy) == "");
    std::vector<element> moved = l.keys;
    const dense<element> source(view<element, 4>(moved.data(), {1, l.kv_heads, l.capacity, l.dim}),
                                {&tokens, {1}});
    REQUIRE(compact(cpu_backend{}, view<const kept_range, 2>(got.data(), {1, 1}),
                    compaction::sinks_up, source) == status::ok);
    const std::vector<element> there = keys.download();
    CHECK(std::memcmp(there.data(), moved.data(), moved.size() * sizeof moved[0]) == 0);
  }
}

// Newer drivers load code during a capture, others end it. No other test launches these kernels.
TEST_CASE("a first call inside of a capture is right, or refused", "[cuda]") {
  const stream s;
  const cuda_backend exec{s.get()};
  const layer<__half, float> l(base_seed() + 2, 1000);
  const device_array<__half> keys(l.keys);
  const device_array<float> queries(l.queries);
  const device_array<position_t> length(std::vector<position_t>{1000});
  const auto layer = l.observed(keys.data(), queries.data(), length.data());
  const policy::refreekv policy;
  const device_array<kept_range> kept(1);
  const device_array<std::byte> scratch(workspace_size(policy, exec, layer));
  const graph cold(s, [&] {
    return select(policy, exec, layer, {kept.data(), {1, 1}}, scratch.as_workspace());
  });
  if (cold.error != cudaSuccess) {
    WARN("this driver loads no code during a capture: " << cudaGetErrorString(cold.error));
    return;
  }
  WARN("this driver loads code during a capture");
  cold.launch();
  CHECK(disagreement(kept.download(), l.attention(1000), policy) == "");
}

TEST_CASE("layers in one batch are decided each by itself", "[cuda]") {
  const stream s;
  const cuda_backend exec{s.get()};
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
    sources.push_back(layers.back().observed(keys.back().data(), nullptr, length.data()).keys);
    queries.insert(queries.end(), layers.back().queries.begin(), layers.back().queries.end());
  }
  const device_array<dense<element, device>> table(sources);
  const device_array<element> rows(queries);
  const auto layer = observe(
      view<const element, 4, device>(rows.data(), {count, 1, 8, 128}),
      layered(view<const dense<element, device>, 1, device>(table.data(), {count}), sources[0]),
      {.index = 2});
  const policy::refreekv policy;
  const device_array<kept_range> kept(count);
  const device_array<std::byte> scratch(workspace_size(policy, exec, layer));
  REQUIRE(select(policy, exec, layer, {kept.data(), {count, 1}}, scratch.as_workspace()) ==
          status::ok);
  s.wait();
  const std::vector<kept_range> got = kept.download();
  for (index_t l = 0; l < count; ++l) {
    INFO("REFREEKV_SEED=" << base_seed() << " layer " << l);
    CHECK(disagreement({got[size(l)]}, layers[size(l)].attention(tokens), policy) == "");
  }
}

// In 5 GB of the device's memory.
TEST_CASE("offsets past 2^31 elements are right", "[cuda]") {
  using element = __nv_bfloat16;
  constexpr index_t tokens = 300, far = (index_t{1} << 31) + 8;
  const layer<element> l(base_seed() + 3, tokens, 1, 2, 4, 16);
  const index_t row = l.dim, head = tokens * row;
  struct strides {
    index_t of_head, of_token;
  };
  for (const strides& apart : {strides{far, row}, strides{row, far / 256}}) {
    const index_t elements = apart.of_head + (tokens - 1) * apart.of_token + row;
    CAPTURE(apart.of_head, apart.of_token);
    const stream s;
    const cuda_backend exec{s.get()};
    const device_array<element> keys(size(elements)), queries(l.queries);
    const auto copy = [&](element* to, index_t to_stride, const element* from, index_t stride) {
      REQUIRE(cudaMemcpy2D(to, size(to_stride) * sizeof *to, from, size(stride) * sizeof *to,
                           size(row) * sizeof *to, size(tokens), cudaMemcpyDefault) == cudaSuccess);
      REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
    };
    for (index_t h = 0; h < 2; ++h) {
      copy(keys.data() + h * apart.of_head, apart.of_token, l.keys.data() + h * head, row);
    }
    const device_array<position_t> length(std::vector<position_t>{tokens});
    const auto layer = l.observed(view<element, 4, device>(keys.data(), {1, 2, tokens, row},
                                                           {0, apart.of_head, apart.of_token, 1}),
                                  queries.data(), length.data());
    const policy::refreekv policy{.threshold = 0.1, .scope = cut_scope::kv_head};
    const device_array<kept_range> kept(2);
    const device_array<std::byte> scratch(workspace_size(policy, exec, layer));
    REQUIRE(prune(policy, exec, layer, {kept.data(), {1, 2}}, scratch.as_workspace(),
                  compaction::sinks_up) == status::ok);
    s.wait();
    const std::vector<kept_range> got = kept.download();
    CHECK(disagreement(got, l.attention(tokens), policy) == "");
    std::vector<element> moved = l.keys, there(l.keys.size());
    const position_t all = tokens;
    const dense<element> source(view<element, 4>(moved.data(), {1, 2, tokens, row}), {&all, {1}});
    REQUIRE(compact(cpu_backend{}, view<const kept_range, 2>(got.data(), {1, 2}),
                    compaction::sinks_up, source) == status::ok);
    for (index_t h = 0; h < 2; ++h) {
      copy(there.data() + h * head, row, keys.data() + h * apart.of_head, apart.of_token);
    }
    CHECK(std::memcmp(there.data(), moved.data(), moved.size() * sizeof moved[0]) == 0);
  }
}

TEST_CASE("a launch that is refused is a device error", "[cuda]") {
  const stream s;
  const layer<__half> l(base_seed() + 4, 300);
  const device_array<__half> keys(l.keys), queries(l.queries);
  const device_array<position_t> length(std::vector<position_t>{300});
  const auto layer = l.observed(keys.data(), queries.data(), length.data());
  const policy::refreekv policy;
  const cuda_backend exec{s.get()};
  const device_array<kept_range> kept(1);
  const device_array<std::byte> scratch(workspace_size(policy, exec, layer));
  // Waiting for a stream ends its capture, and what follows is refused.
  REQUIRE(cudaStreamBeginCapture(s.get(), cudaStreamCaptureModeRelaxed) == cudaSuccess);
  REQUIRE(cudaStreamSynchronize(s.get()) != cudaSuccess);
  CHECK(select(policy, exec, layer, {kept.data(), {1, 1}}, scratch.as_workspace()) ==
        status::device_error);
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(s.get(), &graph);
  cudaGetLastError();
  CHECK(select(policy, exec, layer, {kept.data(), {1, 1}}, scratch.as_workspace()) == status::ok);
  s.wait();
}
