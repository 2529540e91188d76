// SPDX-License-Identifier: Apache-2.0
// The sort keys of rankings by score.
//
// The backend sorts. It provides these functions for a key_segments:
// - `sorts_together(exec, count, capacity)`: whether it sorts all segments as one array.
// - `sort_bytes(exec, segments)`: the bytes of temporary memory that sort_segments needs.
// - `sort_segments(exec, segments, keys, spare, lengths, temporary, bytes)`: sorts lengths[i] keys
//   of each segment, or all slots if together. The sort is stable and by bits [first_bit,
//   last_bit). On return `keys` is the sorted array, and `spare` the other one.
#pragma once

#include <bit>

#include "refreekv/cuda/block/block.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The keys of each head's candidates, [segment, capacity]. From the top bit a key holds the number
/// of its segment, 32 bits of the score, and the token. Keys are written from the last token back
/// and sorts are stable, so the token's bits need no sorting: only half of the bits do.
struct key_segments {
  index_t count;
  index_t capacity;
  int token_bits;
  bool together;  ///< sorted as one array; slots without a candidate hold keys that sort last

  /// Marks a score without a place in the order (NaN), or a slot without a candidate.
  static constexpr std::uint32_t no_score = 0xffffffff;

  template <class Backend>
  [[nodiscard]] static key_segments of(const Backend& exec, index_t count,
                                       index_t capacity) noexcept {
    return {count, capacity, bits_of(capacity), sorts_together(exec, count, capacity)};
  }
  /// Keys are sorted by bits [first_bit, last_bit).
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
  /// Returns how many bits the numbers below `count` need.
  [[nodiscard]] static int bits_of(index_t count) noexcept {
    return count > 1 ? static_cast<int>(std::bit_width(static_cast<std::uint64_t>(count - 1))) : 0;
  }
};

}  // namespace refreekv::inline v0::cuda_detail
