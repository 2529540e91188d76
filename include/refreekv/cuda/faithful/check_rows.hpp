// SPDX-License-Identifier: Apache-2.0
// Checks on a device whether the window rows of a KV head allow a decision.
#pragma once

#include "refreekv/cuda/faithful/importance_scratch.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Writes the logarithm of each existing row's sum of exponentials. Sets `undecided` of each head,
/// before any score is known: true if a row has no softmax, a query is not finite, or there are
/// tokens but no row.
template <class Layer>
struct check_rows_body {
  struct shared {};
  Layer layer;
  index_t rows;
  const row_normaliser* normalisers;  ///< [sequence, q_head, rows]
  double* log_sums;                   ///< [sequence, q_head, rows]
  view<kept_tokens, 2, typename Layer::memory> counts;

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const auto [sequence, kv_head] = head_place::of(item, layer.kv_heads());
    const index_t group = layer.q_heads() / layer.kv_heads();
    const query_window window = window_of(layer, sequence, rows);
    bool good = true;
    for (index_t i = block.rank(); i < group * rows; i += block_threads) {
      if (i % rows < window.first_row()) continue;
      const row_normaliser& row = normalisers[item * group * rows + i];
      log_sums[item * group * rows + i] = row.log_sum();
      good = good && row.exists();
    }
    // Queries are checked themselves, because a soft cap would hide one that is not finite.
    for (index_t i = warp_of(block); i < group * rows; i += block_warps) {
      if (i % rows < window.first_row()) continue;
      const auto* query =
          layer.queries.at(sequence, layer.window() - rows + i % rows, kv_head * group + i / rows);
      for (index_t d = lane_of(block); d < layer.head_dim(); d += warp_threads) {
        good = good && std::fabs(widen(query[d * layer.queries.stride(3)])) < infinity;
      }
    }
    good = block.sync_and(good);
    if (block.rank() == 0) counts(sequence, kv_head).undecided = !good || window.is_blind();
  }
};

}  // namespace refreekv::inline v0::cuda_detail
