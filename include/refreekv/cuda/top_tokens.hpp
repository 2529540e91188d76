// SPDX-License-Identifier: Apache-2.0
// Selects tokens by score on a device: the k best, or the fewest that hold a share of the sum.
#pragma once

#include "refreekv/backend/norm_scan.hpp"
#include "refreekv/cuda/block/bisection.hpp"
#include "refreekv/cuda/selection_scratch.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Returns the number of tokens before the last `recent`.
template <class Layer>
[[nodiscard]] REFREEKV_DEVICE index_t candidates_of(const Layer& layer, index_t sequence,
                                                    index_t recent) noexcept {
  const index_t tokens = layer.tokens(sequence);
  return tokens > recent ? tokens - recent : 0;
}

/// Keeps a head's best and most recent tokens. One block per KV head.
template <class Layer>
struct top_tokens_body {
  using memory = typename Layer::memory;
  using shared = limit_memory<count_bins>;
  quotas_view<memory> quotas;
  Layer layer;
  scores_view<memory> scores;
  kept_positions<memory> kept;

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const auto [sequence, head] = head_place::of(item, layer.kv_heads());
    const index_t tokens = layer.tokens(sequence);
    const token_quota quota = quotas(sequence, head);
    const index_t candidates = candidates_of(layer, sequence, quota.recent);
    if (!block.sync_and(!kept.counts(sequence, head).undecided)) return;
    if (quota.ranked >= candidates) return keep_tokens(block, kept, sequence, head, tokens);
    const value_row row{scores.at(sequence, head), scores.stride(2)};
    if (any_nan(block, row, candidates)) {
      if (block.rank() == 0) kept.counts(sequence, head).undecided = true;
      return;
    }
    const value_limit limit = quota.ranked > 0
                                  ? limit_of_largest(block, s, row, candidates, quota.ranked)
                                  : value_limit::nothing();
    keep_where(block, s.counts, kept, sequence, head, candidates, tokens,
               [&](index_t t) { return limit.selects(row(t), t); });
  }
};

/// The first launch of top_tokens over a grid: weighs each part by the first digit. NaN is detected
/// later, in the launch that counts kept tokens.
template <class Layer>
struct rank_parts_body {
  using memory = typename Layer::memory;
  using shared = limit_memory<count_bins>;
  quotas_view<memory> quotas;
  Layer layer;
  kept_positions<memory> kept;
  grid_descent<count_bins, memory> descent;

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const cut_rows<memory>& rows = descent.rows;
    const auto [sequence, head, part, row] = part_place::of(item, layer.kv_heads(), rows.cut.parts);
    const token_quota quota = quotas(sequence, head);
    const bool undecided = kept.counts(sequence, head).undecided;
    row_tokens tokens{candidates_of(layer, sequence, quota.recent), layer.tokens(sequence)};
    const bool all = undecided || quota.ranked >= tokens.candidates;
    if (all) tokens.candidates = 0;
    if (part >= rows.cut.used(tokens.candidates)) return;
    if (block.rank() == 0) {
      if (part == 0) rows.tokens[row] = tokens;
      rows.limits[item] = undecided ? value_limit::undecided() : value_limit::nothing();
    }
    const auto ranked = static_cast<unsigned>(all ? 0 : quota.ranked);
    descent.weigh(block, s, item, rows.cut.part(part, tokens.candidates), {{}, {0, ranked, 0}}, 0);
  }
};

template <class Backend, class Layer>
[[nodiscard]] status top_tokens(const Backend& exec,
                                const quotas_view<typename Layer::memory>& quotas,
                                const Layer& layer,
                                const scores_view<typename Layer::memory>& scores,
                                const kept_positions<typename Layer::memory>& kept,
                                const selection_scratch& scratch) noexcept {
  status s = status::ok;
  if (scratch.kv_rows.parts > 1) {
    arena carve(scratch.grid);
    using descent_type = grid_descent<count_bins, typename Layer::memory>;
    const auto descent = descent_type::carve(carve, scores, scratch.kv_rows);
    const rank_parts_body<Layer> first{quotas, layer, kept, descent};
    s = run_blocks(exec, descent.rows.items(), first);
    if (s == status::ok) s = keep_on_grid(exec, descent, 1, kept);
  } else {
    const top_tokens_body<Layer> body{quotas, layer, scores, kept};
    s = run_blocks(exec, kv_head_items(layer), body);
  }
  if (s != status::ok) return s;
  return run_blocks(exec, layer.sequences(), keep_undecided_body<Layer>{layer, kept});
}

/// Finds the limit above which scores of a query head hold `share` of their sum.
template <class Layer>
struct mass_limits_body {
  struct shared {
    warp_values<double> sums;
    limit_memory<mass_bins> least;
    bisection_memory bisection;
  };
  double share;
  bool sink_start;
  Layer layer;
  scores_view<typename Layer::memory> scores;
  value_limit* limits;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return layer.sequences() * layer.q_heads();
  }

  /// item: [sequence, q_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const auto [sequence, q_head] = head_place::of(item, layer.q_heads());
    const index_t tokens = layer.tokens(sequence);
    if (tokens == 0) return;
    const value_row row{scores.at(sequence, q_head), scores.stride(2)};
    const value_limit limit = limit_of(block, s, row, tokens);
    if (block.rank() == 0) limits[item] = limit;
  }

 private:
  template <thread_block Block>
  REFREEKV_DEVICE value_limit limit_of(Block& block, shared& s, const value_row& row,
                                       index_t tokens) const noexcept {
    const double sum = sum_of_values(block, s.sums, row, tokens);
    if (!norm_scan::decidable(sum)) return value_limit::undecided();
    return sink_start ? limit_of_bisection(block, s.bisection, row, tokens,
                                           static_cast<float>(1 / sum), static_cast<float>(share))
                      : limit_by_mass(block, s.least, row, tokens, sum, share * sum);
  }
};

/// Keeps the union of the tokens that the query heads of a KV head select.
template <class Layer>
struct keep_union_body {
  using memory = typename Layer::memory;
  using shared = warp_values<std::uint64_t>;
  Layer layer;
  scores_view<memory> scores;
  const value_limit* limits;
  kept_positions<memory> kept;

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const auto [sequence, head] = head_place::of(item, layer.kv_heads());
    const index_t group = layer.q_heads() / layer.kv_heads(), tokens = layer.tokens(sequence);
    const value_row first{scores.at(sequence, head * group), scores.stride(2)};
    const limit_union all{first, scores.stride(1), limits + item * group, 1, group};
    if (tokens > 0 && all.is_undecided()) {
      return keep_tokens(block, kept, sequence, head, tokens, true);
    }
    keep_where(block, s, kept, sequence, head, tokens, tokens,
               [&](index_t t) { return all.selects(t); });
  }
};

/// The first launch of top_mass over a grid: sums the tiles of each query head's scores.
template <class Layer>
struct sum_parts_body {
  using memory = typename Layer::memory;
  using shared = warp_values<double>;
  Layer layer;
  grid_descent<mass_bins, memory> descent;

  /// item: [sequence, q_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const cut_rows<memory>& rows = descent.rows;
    const index_t row = item / rows.cut.parts, part = item % rows.cut.parts;
    const index_t tokens = layer.tokens(row / layer.q_heads());
    double* sums = descent.sums + row * tiles_of(rows.scores.extent(2));
    for (index_t tile = part; tile < tiles_of(tokens); tile += rows.cut.parts) {
      const double sum = sum_of_tile(block, s, rows.row(row), tokens, tile);
      if (block.rank() == 0) sums[tile] = sum;
    }
    if (part == 0 && block.rank() == 0) rows.tokens[row] = {tokens, tokens};
  }
};

/// The second launch of top_mass over a grid: weighs each part by the first digit.
template <class Memory>
struct weigh_masses_body {
  struct shared {
    warp_values<double> sums;
    limit_memory<mass_bins> least;
  };
  double share;
  grid_descent<mass_bins, Memory> descent;

  /// item: [sequence, q_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const cut_rows<Memory>& rows = descent.rows;
    const index_t row = item / rows.cut.parts, part = item % rows.cut.parts;
    const index_t tokens = rows.tokens[row].candidates;
    if (part >= rows.cut.used(tokens)) return;
    const double* sums = descent.sums + row * tiles_of(rows.scores.extent(2));
    const double sum = sum_of_tiles(block, s.sums, sums, tokens);
    const bool decided = norm_scan::decidable(sum);
    if (block.rank() == 0) {
      rows.limits[item] =
          decided || tokens == 0 ? value_limit::nothing() : value_limit::undecided();
    }
    const mass_bins bins(decided ? sum : 1);
    descent.weigh(block, s.least, item, rows.cut.part(part, tokens),
                  {bins, {0, decided ? bins.at_least(share * sum) : 0, 0}}, 0);
  }
};

template <class Backend, class Layer>
[[nodiscard]] status top_mass(const Backend& exec, double share, bool sink_start,
                              const Layer& layer, const scores_view<typename Layer::memory>& scores,
                              const kept_positions<typename Layer::memory>& kept,
                              const selection_scratch& scratch) noexcept {
  // A bisection reads its row a number of times that depends on the values. It cannot be a fixed
  // number of launches, so it stays in one block.
  if (scratch.q_rows.parts > 1 && !sink_start) {
    using memory = typename Layer::memory;
    arena carve(scratch.grid);
    const auto descent = grid_descent<mass_bins, memory>::carve(carve, scores, scratch.q_rows);
    const index_t items = descent.rows.items();
    status s = run_blocks(exec, items, sum_parts_body<Layer>{layer, descent});
    if (s == status::ok) s = run_blocks(exec, items, weigh_masses_body<memory>{share, descent});
    if (s != status::ok) return s;
    return keep_on_grid(exec, descent, layer.q_heads() / layer.kv_heads(), kept);
  }
  const mass_limits_body<Layer> limits{share, sink_start, layer, scores, scratch.limits};
  const status s = run_blocks(exec, limits.items(), limits);
  if (s != status::ok) return s;
  const keep_union_body<Layer> keep{layer, scores, scratch.limits, kept};
  return run_blocks(exec, kv_head_items(layer), keep);
}

}  // namespace refreekv::inline v0::cuda_detail
