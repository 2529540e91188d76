// SPDX-License-Identifier: Apache-2.0
#include "page_pruning.hpp"

#include <algorithm>
#include <numeric>

#include "policy_runner.hpp"

namespace paged {

using refreekv::index_t;
using refreekv::view;
using smollm2::require_ok;

namespace {

auto observe_layer(std::size_t layer, std::span<const float> queries, std::size_t q_heads,
                   const paged_layer& cache) {
  const std::size_t rows = queries.size() / (q_heads * cache.head_dim());
  return refreekv::observe(
      view(queries.data(), {1, static_cast<index_t>(rows), static_cast<index_t>(q_heads),
                            static_cast<index_t>(cache.head_dim())}),
      cache.rows().keys, {.index = static_cast<index_t>(layer)});
}

page_release prune_layer(const refreekv::policy::refreekv& policy, std::size_t layer,
                         std::span<const float> queries, std::size_t q_heads, paged_layer& cache) {
  return release(decide(policy, layer, queries, q_heads, cache), cache);
}

// What stays moves down, and the stand-ins behind it; so the pages at the end are what is free.
page_release prune_layer(refreekv::policy::faithful policy, std::size_t layer,
                         std::span<const float> queries, std::size_t q_heads, paged_layer& cache) {
  policy.scope = refreekv::cut_scope::layer;  // heads on the same pages have one length
  // Sinks stay in their slots, so that nothing is written before the first token that goes.
  policy.sinks = std::max(policy.sinks, static_cast<refreekv::count_t>(cache.shared_tokens()));
  const auto [keys, values] = cache.rows();
  smollm2::layer_pruning result{};
  smollm2::policy_runner runner(1);
  runner.decide(
      policy, refreekv::with_values(observe_layer(layer, queries, q_heads, cache), values), result);
  const std::size_t kept = runner.compact(result, keys, values).front().length;

  std::vector<block_id> table = cache.table();
  const std::size_t promised = (cache.length(0) - kept) / cache.pool().shape().tokens;
  table.resize(table.size() - promised);
  page_release released{.tokens = cache.length(0),
                        .kept = kept,
                        .stand_ins = kept - static_cast<std::size_t>(result.counts.front().count),
                        .pages_before = cache.table().size(),
                        .pages_after = table.size(),
                        .promised = promised,
                        .returned = {}};
  released.returned =
      cache.shrink(std::move(table), {.tokens = static_cast<refreekv::position_t>(kept)});
  return released;
}

}  // namespace

double share_of(std::size_t page_release::*count, const std::vector<page_release>& releases) {
  double sum = 0, tokens = 0;
  for (const page_release& each : releases) {
    sum += static_cast<double>(each.*count);
    tokens += static_cast<double>(each.tokens);
  }
  return sum / tokens;
}

page_release prune(const page_policy& policy, std::size_t layer, std::span<const float> queries,
                   std::size_t q_heads, paged_layer& cache) {
  return std::visit(
      [&](const auto& each) { return prune_layer(each, layer, queries, q_heads, cache); }, policy);
}

smollm2::prefill_hooks_for<paged_cache> pruning_hooks(const page_policy& policy,
                                                      std::size_t q_heads,
                                                      std::vector<page_release>& releases) {
  return {.window = std::visit([](const auto& each) -> std::size_t { return each.window; }, policy),
          .on_layer = [=, &releases](std::size_t layer, std::span<const float> queries,
                                     paged_cache& cache) {
            releases.push_back(prune(policy, layer, queries, q_heads, cache.layer(layer)));
          }};
}

refreekv::kept_range decide(const refreekv::policy::refreekv& policy, std::size_t layer,
                            std::span<const float> queries, std::size_t q_heads,
                            const paged_layer& cache) {
  smollm2::layer_pruning result{};
  smollm2::policy_runner(1).decide(policy, observe_layer(layer, queries, q_heads, cache), result);
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
  require_ok(
      refreekv::compact(cpu, plans.compact_ranges, refreekv::compaction::sinks_up, keys, values));

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

  page_release released{.tokens = static_cast<std::size_t>(kept.tokens),
                        .kept = static_cast<std::size_t>(kept.length()),
                        .stand_ins = 0,
                        .pages_before = cache.table().size(),
                        .pages_after = table.size(),
                        .promised = static_cast<std::size_t>(plan.freed),
                        .returned = std::move(returned)};
  cache.shrink(std::move(table), slots);
  return released;
}

}  // namespace paged
