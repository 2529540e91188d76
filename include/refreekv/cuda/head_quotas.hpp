// SPDX-License-Identifier: Apache-2.0
// Shares a sequence's quota among its KV heads, on a device. It uses the radix descent of
// grid_limit.hpp, with one limit for the scores of all heads of a sequence.
#pragma once

#include "refreekv/cuda/top_tokens.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Counts in 64 bits, because all heads together may have more than 2^32 scores.
template <class Memory>
using sharing_scratch = grid_descent<count_bins_of<std::uint64_t>, Memory>;

template <class Layer>
[[nodiscard]] sharing_scratch<typename Layer::memory> carve_sharing_scratch(
    arena& from, const Layer& layer, const row_cut& cut) noexcept {
  using memory = typename Layer::memory;
  const scores_view<memory> rows(nullptr, {layer.sequences(), layer.kv_heads(), layer.capacity()});
  return sharing_scratch<memory>::carve(from, rows, cut, layer.kv_heads());
}
/// Each block sums the counts of all heads' parts. The more heads there are, the fewer parts a row
/// is therefore cut into.
template <class Layer>
[[nodiscard]] auto carve_sharing_scratch(arena& from, const Layer& layer) noexcept {
  const index_t heads = layer.kv_heads();
  const index_t most = heads < row_cut::most_parts ? row_cut::most_parts / heads : 1;
  return carve_sharing_scratch(from, layer,
                               row_cut::of(layer.sequences() * heads, layer.capacity(), most));
}

/// The first launch: weighs each part by the first digit.
template <class Layer>
struct rank_heads_body {
  using memory = typename Layer::memory;
  using bins = count_bins_of<std::uint64_t>;
  using shared = limit_memory<bins>;
  const token_quota* quotas;
  Layer layer;
  sharing_scratch<memory> descent;

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const cut_rows<memory>& rows = descent.rows;
    const auto [sequence, head, part, row] = part_place::of(item, layer.kv_heads(), rows.cut.parts);
    const token_quota quota = quotas[sequence];
    row_tokens tokens{candidates_of(layer, sequence, quota.recent), layer.tokens(sequence)};
    const bool all = quota.ranked >= tokens.candidates;
    if (all) tokens.candidates = 0;
    if (block.rank() == 0) {
      if (part == 0) rows.tokens[row] = tokens;
      rows.limits[item] = value_limit::nothing();
    }
    const auto ranked = static_cast<std::uint64_t>(all ? 0 : quota.ranked * layer.kv_heads());
    descent.weigh(block, s, item, rows.cut.part(part, tokens.candidates), {bins{}, {0, ranked, 0}},
                  0);
  }
};

/// The last launch: sums how many of the best scores are in the parts of a head, and writes its
/// share. A part with NaN counts as 0.
template <class Layer>
struct assign_share {
  using memory = typename Layer::memory;
  double floor;
  const token_quota* quotas;
  Layer layer;
  cut_rows<memory> rows;
  token_quota* shared;

  /// row: [sequence, kv_head]
  REFREEKV_HOST_DEVICE void operator()(index_t row) const noexcept {
    const token_quota quota = quotas[row / layer.kv_heads()];
    const index_t candidates = rows.tokens[row].candidates;
    if (candidates == 0) {
      shared[row] = quota;
      return;
    }
    index_t best = 0;
    for (index_t part = 0; part < rows.cut.used(candidates); ++part) {
      const position_t count = rows.counts[row * rows.cut.parts + part];
      best += count > 0 ? count : 0;
    }
    shared[row] = quota.of_head(floor, best);
  }
};

template <class Backend, class Layer>
[[nodiscard]] status share_quotas(const Backend& exec, double floor, const token_quota* quotas,
                                  const Layer& layer,
                                  const scores_view<typename Layer::memory>& scores,
                                  token_quota* shared,
                                  sharing_scratch<typename Layer::memory> descent) noexcept {
  descent.rows.scores = scores;
  const rank_heads_body<Layer> first{quotas, layer, descent};
  status s = run_blocks(exec, descent.rows.items(), first);
  if (s == status::ok) {
    s = find_on_grid(exec, descent, grid_keep<typename Layer::memory>{descent.rows, 1, {}});
  }
  if (s != status::ok) return s;
  using assign = assign_share<Layer>;
  const index_t rows = kv_head_items(layer);
  const assign last{floor, quotas, layer, descent.rows, shared};
  return run_blocks(exec, blocks_for(rows), for_each_body<assign>{rows, last});
}

}  // namespace refreekv::inline v0::cuda_detail
