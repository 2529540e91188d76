// SPDX-License-Identifier: Apache-2.0
// What the CUDA backend asks of the runtime, which needs no device: nothing is allocated, copied or
// waited for, and what is launched depends on extents alone.
#include <set>

#include "catch.hpp"
#include "fake_runtime.hpp"
#include "refreekv/cuda.cuh"

using namespace refreekv;
using fake_runtime::made;

namespace {

using device = device_memory;
using element = __nv_bfloat16;

/// Addresses that nothing is read from.
template <class T>
T* somewhere() {
  return reinterpret_cast<T*>(std::uintptr_t{1} << 20);
}

/// A layer of llama3_8b, of whose queries 16 rows are there.
auto observed(index_t sequences, index_t capacity) {
  const dense<element, device> keys(
      view<element, 4, device>(somewhere<element>(), {sequences, 8, capacity, 128}),
      lengths_view<device>(somewhere<const position_t>(), {sequences}));
  return observe(
      view<const element, 4, device>(somewhere<const element>(), {sequences, 16, 32, 128}), keys,
      {.index = 5});
}

template <class Policy, class Layer>
status decide(const Policy& policy, const Layer& layer) {
  const cuda_backend exec;
  made = {.counts = {}, .blocks = {}, .last = made.last};
  const std::size_t bytes = workspace_size(policy, exec, layer);
  CHECK(made.counts.empty());
  const workspace<device> scratch{somewhere<std::byte>(), bytes};
  const index_t sequences = layer.sequences(), heads = layer.kv_heads();
  if constexpr (std::same_as<decision_of<Policy, device>, kept_ranges<device>>) {
    return select(policy, exec, layer,
                  {somewhere<kept_range>(), {sequences, groups_of(policy, layer)}}, scratch);
  } else {
    return select(
        policy, exec, layer,
        kept_positions<device>{{somewhere<position_t>(), {sequences, heads, layer.capacity()}},
                               {somewhere<kept_tokens>(), {sequences, heads}}},
        scratch);
  }
}

/// The functions that were called.
std::set<std::string> functions() {
  std::set<std::string> names;
  for (const auto& [name, count] : made.counts) names.insert(name);
  return names;
}

}  // namespace

TEST_CASE("a decision is launches and nothing else", "[runtime]") {
  const std::set<std::string> launches{"cudaLaunchKernelExC"};
  const auto layer = observed(2, 4096);
  for (const policy::refreekv& policy : {policy::refreekv{}, policy::refreekv{.window = 16},
                                         policy::refreekv{.scope = cut_scope::kv_head}}) {
    REQUIRE(decide(policy, layer) == status::ok);
    CHECK(functions() == launches);
  }
  REQUIRE(decide(policy::snapkv{.budget = 500, .window = 16}, layer) == status::ok);
  CHECK(functions() == launches);
}

TEST_CASE("no decision launches blocks for a capacity that prompts do not fill", "[runtime]") {
  for (const index_t sequences : {1, 32, 512}) {
    const index_t heads = sequences * 8, most = std::max<index_t>(2048, 32 * heads);
    for (const index_t capacity : {8192, 131072, 1 << 24}) {
      INFO(sequences << " sequences, capacity " << capacity);
      const auto layer = observed(sequences, capacity);
      REQUIRE(decide(policy::refreekv{}, layer) == status::ok);
      CHECK(made.launches() == 7);
      // One launch has a thread for each chunk.
      for (const unsigned blocks : made.blocks) {
        CHECK(index_t{blocks} <= std::max(most, sequences * (capacity / 256 / 256 + 1)));
      }
      // Windows of 16 rows have up to 16 tiles for each KV head.
      const auto few_blocks = [&](const auto& policy) {
        REQUIRE(decide(policy, layer) == status::ok);
        for (const unsigned blocks : made.blocks) CHECK(index_t{blocks} <= 16 * most);
      };
      few_blocks(policy::refreekv{.window = 16});
      few_blocks(policy::snapkv{.budget = 500, .window = 16});
      few_blocks(policy::attention_ranked{});
    }
  }
}

TEST_CASE("a sort has the memory that CUB wants", "[runtime]") {
  for (const auto& [sequences, capacity] :
       {std::pair{1, 300}, {1, 8192}, {1, 131072}, {4, 16384}, {64, 8192}, {1, 1 << 24}}) {
    INFO(sequences << " sequences, capacity " << capacity);
    REQUIRE(decide(policy::attention_ranked{}, observed(sequences, capacity)) == status::ok);
    for (const char* forbidden :
         {"cudaMalloc", "cudaMallocAsync", "cudaFree", "cudaMemcpy", "cudaMemcpyAsync",
          "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}) {
      CHECK(made.counts.count(forbidden) == 0);
    }
  }
}

TEST_CASE("an error that waits to be read is nobody else's", "[runtime]") {
  const auto layer = observed(1, 4096);
  made.last = cudaErrorInvalidValue;
  CHECK(decide(policy::refreekv{}, layer) == status::ok);
  CHECK(decide(policy::snapkv{.budget = 500, .window = 16}, layer) == status::ok);
  CHECK(decide(policy::attention_ranked{}, layer) == status::device_error);
  CHECK(made.last == cudaErrorInvalidValue);
  made.last = cudaSuccess;
  CHECK(decide(policy::attention_ranked{}, layer) == status::ok);
}
