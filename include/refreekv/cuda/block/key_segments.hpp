// SPDX-License-Identifier: Apache-2.0
// The keys that rankings by score are sorted by.
//
// Sorting is the backend's: it provides, for a key_segments,
// - `sorts_together(on, count, capacity)`: whether it sorts segments as one array;
// - `sort_bytes(on, segments)`: the temporary memory that sort_segments needs;
// - `sort_segments(on, segments, keys, spare, lengths, temporary, bytes)`: sorts lengths[i] keys of
//   each segment, all of it if together, by bits [first_bit, last_bit) and in the order of equals.
//   `keys` is the sorted array afterwards, `spare` the other one.
#pragma once

#include <bit>

#include "refreekv/cuda/block/block.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The keys of each head's candidates, [segment, capacity] of them: from the top bit, the number of
/// the segment, 32 bits of the score, and the token, which is carried along. As they are written
/// from the last token back and sorts keep the order of equals, half of the bits are sorted by.
struct key_segments {
  index_t count;
  index_t capacity;
  int token_bits;
  bool together;  ///< sorted as one array: slots that no candidate has hold keys that come last

  /// A score that has no place in any order, or none at all.
  static constexpr std::uint32_t no_score = 0xffffffff;

  template <class Backend>
  [[nodiscard]] static key_segments of(const Backend& exec, index_t count,
                                       index_t capacity) noexcept {
    return {count, capacity, bits_of(capacity), sorts_together(exec, count, capacity)};
  }
  /// The bits that keys are sorted by.
  [[nodiscard]] int first_bit() const noexcept { return token_bits; }
  [[nodiscard]] int last_bit() const noexcept {
    return token_bits + 32 + (together ? bits_of(count) : 0);
  }

  [[nodiscard]] REFREEKV_DEVICE std::uint64_t key(index_t segment, std::uint32_t score,
                                                  index_t token) const noexcept {
    const auto order = static_cast<std::uint64_t>(segment) << 32 | score;
    return order << token_bits | static_cast<std::uint64_t>(token);
  }
  [[nodiscard]] REFREEKV_DEVICE std::uint32_t score_of(std::uint64_t key) const noexcept {
    return static_cast<std::uint32_t>(key >> token_bits);
  }
  [[nodiscard]] REFREEKV_DEVICE position_t token_of(std::uint64_t key) const noexcept {
    return static_cast<position_t>(key & ((std::uint64_t{1} << token_bits) - 1));
  }

 private:
  /// Of the numbers below `count`.
  [[nodiscard]] static int bits_of(index_t count) noexcept {
    return count > 1 ? static_cast<int>(std::bit_width(static_cast<std::uint64_t>(count - 1))) : 0;
  }
};

}  // namespace refreekv::inline v0::cuda_detail
