// SPDX-License-Identifier: Apache-2.0
// The places of a batch at which blocks work: heads, and parts of heads.
#pragma once

#include "refreekv/cuda/block/block.hpp"

namespace refreekv::inline v0::cuda_detail {

/// A head of a sequence. Items are [sequence, head].
struct head_place {
  index_t sequence;
  index_t head;

  [[nodiscard]] static REFREEKV_DEVICE head_place of(index_t item, index_t heads) noexcept {
    return {item / heads, item % heads};
  }
};

/// The number of items [sequence, kv_head].
template <class Batch>
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t kv_head_items(const Batch& batch) noexcept {
  return batch.shape().sequences * batch.shape().kv_heads;
}

/// A part of a head's tokens.
struct part_place {
  index_t sequence;
  index_t head;
  index_t part;
  index_t row;  ///< of [sequence, head]

  /// Items are [sequence, head, part].
  [[nodiscard]] static REFREEKV_DEVICE part_place of(index_t item, index_t heads,
                                                     index_t parts) noexcept {
    const index_t row = item / parts;
    return {row / heads, row % heads, item % parts, row};
  }
  /// Items are [sequence, part, head]: blocks that run together read the keys of one page.
  [[nodiscard]] static REFREEKV_DEVICE part_place of_interleaved(index_t item, index_t heads,
                                                                 index_t parts) noexcept {
    const index_t head = item % heads, sequence = item / heads / parts;
    return {sequence, head, item / heads % parts, sequence * heads + head};
  }
};

}  // namespace refreekv::inline v0::cuda_detail
