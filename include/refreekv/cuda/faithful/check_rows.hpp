// SPDX-License-Identifier: Apache-2.0
// Whether the rows of a KV head's window can be decided on, on a device.
#pragma once

#include "refreekv/cuda/faithful/importance_scratch.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Leaves the logarithms of what the rows' exponentials sum to, and tells which heads are undecided
/// whatever their scores are.
template <class Seen>
struct check_rows_body {
  struct shared {};
  Seen seen;
  index_t rows;
  const row_normaliser* normalisers;  ///< [sequence, q_head, rows]
  double* log_sums;                   ///< [sequence, q_head, rows]
  view<kept_count, 2, typename Seen::memory> counts;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.kv_heads();
  }

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t sequence = item / seen.kv_heads(), group = seen.q_heads() / seen.kv_heads();
    const index_t kv_head = item % seen.kv_heads();
    const query_window window = window_of(seen, sequence, rows);
    bool good = true;
    for (index_t i = block.rank(); i < group * rows; i += block_threads) {
      if (i % rows < window.first_row()) continue;
      const row_normaliser& row = normalisers[item * group * rows + i];
      log_sums[item * group * rows + i] = row.log_sum();
      good = good && row.exists();
    }
    // A soft cap would hide a query that is not finite.
    for (index_t i = warp_of(block); i < group * rows; i += block_warps) {
      if (i % rows < window.first_row()) continue;
      const auto* query =
          seen.queries.at(sequence, seen.window() - rows + i % rows, kv_head * group + i / rows);
      for (index_t d = lane_of(block); d < seen.head_dim(); d += warp_threads) {
        good = good && std::fabs(widen(query[d * seen.queries.stride(3)])) < infinity;
      }
    }
    good = block.sync_and(good);
    if (block.rank() == 0) counts(sequence, kv_head).undecided = !good || window.is_blind();
  }
};

}  // namespace refreekv::inline v0::cuda_detail
