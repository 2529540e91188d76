// SPDX-License-Identifier: Apache-2.0
// Keys in 4 bits per dimension, which Twilight (arXiv 2502.02770) reads in place of the keys.
#pragma once

#include "refreekv/cache/source.hpp"

namespace refreekv::inline v0 {

/// Keys in 4 bits per dimension. An engine keeps them beside its cache, adds new tokens with
/// `quantise`, and observes them in place of the keys. They are compacted as two sources: codes, of
/// (head_dim + 1) / 2 bytes per token, and ranges, of 2 floats per token. Centres do not move.
template <class Memory = host_memory>
struct int4_keys {
  using memory = Memory;

  /// [sequence, kv_head, token, (head_dim + 1) / 2] bytes: dimension 2 i is in the low half of byte
  /// i, 2 i + 1 in its high half. The last axis is contiguous.
  view<std::uint8_t, 4, Memory> codes;
  /// [sequence, kv_head, token, 2]: low and step. A key is low + step * code, plus the centre if
  /// there is one.
  view<float, 4, Memory> ranges;
  index_t dims;  ///< head_dim
  lengths_view<Memory> lengths;
  /// [sequence, kv_head, head_dim]: subtracted from keys before they are quantised. A null pointer
  /// means no centres. They are for models whose keys have biases or other large common components.
  /// All dimensions of a key share 16 steps, so a dimension at 100, as in Qwen2, leaves no steps
  /// for the others. The last axis is contiguous. (ours)
  view<float, 3, Memory> centres = {};

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr cache_shape shape() const noexcept {
    return {codes.extent(0), codes.extent(1), codes.extent(2), dims};
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    return length_of(lengths, sequence, codes.extent(2));
  }
  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (codes.malformed() || ranges.malformed()) {
      return "codes and ranges need a pointer and extents >= 0";
    }
    if (dims < 1 || dims > max_count) return "head_dim must be in [1, 2^31 - 1]";
    if (codes.extent(3) != (dims + 1) / 2 || codes.stride(3) != 1) {
      return "codes must be [sequence, kv_head, token, (head_dim + 1) / 2]";
    }
    for (std::size_t axis = 0; axis < 3; ++axis) {
      if (ranges.extent(axis) != codes.extent(axis)) return "codes and ranges differ in extents";
    }
    if (ranges.extent(3) != 2) return "ranges must be [sequence, kv_head, token, 2]";
    const bool centred = centres.data() != nullptr || centres.extent(1) != 0;
    if (centred && (centres.malformed() || centres.extent(0) != codes.extent(0) ||
                    centres.extent(1) != codes.extent(1) || centres.extent(2) != dims ||
                    centres.stride(2) != 1)) {
      return "centres must be [sequence, kv_head, head_dim]";
    }
    return invalid_lengths(lengths, codes.extent(0), codes.extent(2));
  }
};

}  // namespace refreekv::inline v0
