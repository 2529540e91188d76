// SPDX-License-Identifier: Apache-2.0
// select and compact never allocate: neither through operator new nor through Eigen.
#undef NDEBUG
#define EIGEN_RUNTIME_NO_MALLOC  // Eigen asserts when it allocates while that is not allowed
#include <cstdio>
#include <cstdlib>
#include <new>

#include "layouts.hpp"

namespace {
std::atomic<bool> forbidden{false};
}

[[gnu::noinline]] void* operator new(std::size_t bytes) {
  if (forbidden) {
    std::fputs("operator new was called\n", stderr);
    std::abort();
  }
  if (void* memory = std::malloc(bytes)) return memory;
  std::abort();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

using namespace refreekv;

int main() {
  thread_pool pool(2);
  random_source random(base_seed());
  problem p(2, 3, 80, 20, {700, 3, 0});
  fill(p, random);
  p.soft_cap = 30;
  p.sink_logits.assign(6, 1.0f);
  p.alibi_slopes.assign(6, 0.01f);
  const std::vector<float> attention(6 * 700, 0.01f);
  int runs = 0;
  for_each_layout<Eigen::half>(p.keys, [&](const char*, const auto& cache) {
    for (const row_average average : {row_average::mean, row_average::frobenius}) {
      const policy::refreekv policy{.threshold = 0.1, .window = 20, .average = average};
      const policy::refreekv one_row{.average = average, .scope = cut_scope::kv_head};
      const auto rows = observe_rows(view(attention.data(), {1, 1, 6, 700}), 2, {}, {.index = 3});
      const cpu_backend exec{pool};
      const auto layer = observe(p.query_view(), cache.source(), p.info());
      std::vector<std::byte> scratch(workspace_size(policy, exec, layer));
      std::vector<kept_range> kept(3);
      const view<kept_range, 2> cuts(kept.data(), {3, 1});
      const token_range whole[] = {{0, 700}, {0, 3}, {0, 0}};
      const position_t totals[] = {700, 3, 0};
      const auto shard_seen = observe(
          p.query_view(), shard(cache.source(), view(whole, {3, 1}), {totals, {3}}, 700), p.info());
      const auto alone = [](std::uint32_t*, index_t) { return status::ok; };
      const policy::snapkv snapkv{.budget = 40, .window = 20};
      const policy::cake cake{.budget = 40, .window = 20, .layers = 10};
      const policy::attention_ranked ranked{.threshold = 0.1};
      const policy::twilight twilight;
      const policy::faithful faithful{.tolerance = 0.3};
      const index_t capacity = layer.capacity();
      std::vector<position_t> tokens(size(3 * 2 * capacity));
      std::vector<kept_tokens> counts(3 * 2);
      const kept_positions<> positions{{tokens.data(), {3, 2, capacity}}, {counts.data(), {3, 2}}};
      const kept_positions<> two_heads{{tokens.data(), {1, 2, 700}}, {counts.data(), {1, 2}}};
      std::vector<float> scores(size(3 * 2 * capacity));
      std::vector<double> preferences(3 * 10);
      const cake_layers<> layers{
          {scores.data(), {3, 2, capacity}}, {preferences.data(), {3, 10}}, 10};
      layer_info<> without_slopes = p.info();
      without_slopes.attention.alibi_slopes = {};
      const dense_cache<Eigen::half> values(p.keys);
      const auto valued =
          with_values(observe(p.query_view(), cache.source(), without_slopes), values.source());
      const index_t most = faithful.most_stand_ins(capacity);
      std::vector<float> rows_of_keys(size(3 * 2 * most * 80)), rows_of_values(rows_of_keys);
      std::vector<position_t> row_counts(3 * 2);
      const kept_with_stand_ins<> with_rows(positions, {{rows_of_keys.data(), {3, 2, most, 80}},
                                                        {rows_of_values.data(), {3, 2, most, 80}},
                                                        {row_counts.data(), {3, 2}}});
      const auto room_for = [&](const auto& each, const auto& what) {
        return std::vector<std::byte>(workspace_size(each, exec, what));
      };
      auto snapkv_scratch = room_for(snapkv, layer);
      auto cake_scratch = room_for(cake, with_layers(layer, layers));
      auto ranked_scratch = room_for(ranked, layer);
      auto twilight_scratch = room_for(twilight, rows);
      auto faithful_scratch = room_for(faithful, valued);
      auto shard_scratch = room_for(policy, shard_seen);
      forbidden = true;
      Eigen::internal::set_is_malloc_allowed(false);
      const status first = prune(policy, exec, layer, cuts, scratch, compaction::sinks_up);
      const status second =
          compact(exec, view<const kept_range, 2>(cuts), compaction::suffix_down, cache.source());
      const status third = prune(policy::streaming_llm{}, exec, observe(cache.source()), cuts,
                                 workspace<>{}, compaction::sinks_up);
      const status fourth = select(one_row, exec, rows, {kept.data(), {1, 2}}, scratch);
      const status fifth = select(snapkv, exec, layer, positions, snapkv_scratch);
      const status sixth = select(cake, exec, with_layers(layer, layers), positions, cake_scratch);
      const status seventh = select(ranked, exec, layer, positions, ranked_scratch);
      const status eighth = compact(exec, positions, compaction::suffix_down, cache.source());
      const status ninth = select(twilight, exec, rows, two_heads, twilight_scratch);
      const status tenth = select(policy, exec, shard_seen, cuts, shard_scratch, alone);
      const status eleventh =
          local_ranges(exec, shard_seen.keys, view<const kept_range, 2>(cuts), cuts);
      const status twelfth =
          prune(faithful, exec, valued, with_rows, faithful_scratch, compaction::suffix_down);
      Eigen::internal::set_is_malloc_allowed(true);
      forbidden = false;
      for (const status s : {first, second, third, fourth, fifth, sixth, seventh, eighth, ninth,
                             tenth, eleventh, twelfth}) {
        if (s != status::ok) std::abort();
      }
      ++runs;
    }
  });
  std::printf("%d runs without an allocation\n", runs);
  return runs == 14 ? 0 : 1;
}
