// SPDX-License-Identifier: Apache-2.0
// The norm scan's stop rule on a falling curve, computed by a whole block.
#pragma once

#include "refreekv/backend/norm_scan.hpp"
#include "refreekv/cuda/block/block.hpp"

namespace refreekv::inline v0::cuda_detail {

/// norm_scan::last_allowed, computed by a whole block. curve: [count]. O(count / threads)
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE index_t last_allowed(Block& block, warp_values<index_t>& shared,
                                                   const norm_scan& scan, const double* curve,
                                                   index_t count, double baseline) noexcept {
  index_t last = 0;
  for (index_t i = block.rank(); i < count; i += block_threads) {
    if (norm_scan::loss(curve[i], baseline) <= scan.threshold) last = i;
  }
  return block_reduce(block, shared, last, larger{});
}

}  // namespace refreekv::inline v0::cuda_detail
