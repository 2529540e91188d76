// SPDX-License-Identifier: Apache-2.0
#include "page_pruning.hpp"

#include <numeric>

#include "rule_runner.hpp"

namespace paged {

using refreekv::index_t;
using refreekv::view;
using smollm2::require_ok;

refreekv::kept_range decide(const refreekv::policy::refreekv& rule, std::size_t layer,
                            std::span<const float> queries, std::size_t q_heads,
                            const paged_layer& cache) {
  const std::size_t rows = queries.size() / (q_heads * cache.head_dim());
  const auto seen = refreekv::observe(
      view(queries.data(), {1, static_cast<index_t>(rows), static_cast<index_t>(q_heads),
                            static_cast<index_t>(cache.head_dim())}),
      cache.rows().keys, {.layer = static_cast<index_t>(layer)});
  smollm2::layer_pruning result{};
  smollm2::rule_runner(1).decide(rule, seen, result);
  return std::accumulate(result.kept.begin(), result.kept.end(), result.kept.front(),
                         refreekv::unite);
}

page_release release(const refreekv::kept_range& kept, paged_layer& cache) {
  const refreekv::cpu_backend cpu;
  const std::vector<std::uint8_t> bits = cache.shared_pages();
  const view shared(bits.data(), {1, static_cast<index_t>(bits.size())});

  refreekv::page_plan plan;
  refreekv::kept_range moves, slots;
  const refreekv::page_plans<> plans{view(&plan, {1}), view(&moves, {1, 1}), view(&slots, {1, 1})};
  require_ok(refreekv::plan_pages(
      cpu, view(&kept, {1, 1}), static_cast<index_t>(cache.pool().shape().tokens), plans, shared));
  const auto [keys, values] = cache.rows();
  require_ok(refreekv::compact(cpu, plans.moves, refreekv::compaction::sinks_up, keys, values));

  std::vector<block_id> table = cache.table(), returned(table.size());
  const auto width = static_cast<index_t>(table.size());
  auto pages = static_cast<refreekv::position_t>(width);
  refreekv::position_t freed = 0;
  require_ok(refreekv::release_pages(
      cpu, plans.plans,
      refreekv::page_lists<block_id>{view(table.data(), {1, width}), view(&pages, {1})},
      refreekv::page_lists<block_id>{view(returned.data(), {1, width}), view(&freed, {1})},
      shared));
  table.resize(static_cast<std::size_t>(pages));
  returned.resize(static_cast<std::size_t>(freed));

  page_release result{kept, cache.table().size(), table.size(),
                      static_cast<std::size_t>(plan.freed), std::move(returned)};
  cache.shrink(std::move(table), slots);
  return result;
}

}  // namespace paged
