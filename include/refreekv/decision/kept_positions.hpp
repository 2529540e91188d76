// SPDX-License-Identifier: Apache-2.0
// The result of a decision that is not a range: the kept positions of each KV head.
#pragma once

#include "refreekv/decision/kept_range.hpp"

namespace refreekv::inline v0 {

/// Number of tokens that one KV head of a sequence keeps. Members are named as in kept_range.
struct kept_tokens {
  position_t count = 0;
  position_t tokens = 0;
  /// No decision was possible: NaN or Inf in a query or a key, or no query or attention row. All
  /// tokens stay. The flag may also be set where a decision would have kept all tokens anyway.
  bool undecided = false;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr position_t length() const noexcept { return count; }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr position_t dropped() const noexcept {
    return tokens - count;
  }
  /// The position of the next token, as in kept_range. If the cache was pruned before, as at each
  /// step of an eviction, add the number of tokens dropped then.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr position_t next_position() const noexcept {
    return tokens;
  }
  [[nodiscard]] constexpr double kept_fraction() const noexcept {
    return tokens == 0 ? 1.0 : static_cast<double>(count) / tokens;
  }
  friend constexpr bool operator==(const kept_tokens&, const kept_tokens&) noexcept = default;
};

/// The kept tokens of every KV head of every sequence.
template <class Memory = host_memory>
struct kept_positions {
  /// [sequence, kv_head, capacity]: the first counts(s, h).count entries of a row are the kept
  /// positions, ascending. The entries after them are undefined.
  view<position_t, 3, Memory> positions;
  view<kept_tokens, 2, Memory> counts;  ///< [sequence, kv_head]
};

/// Writes mask [kept.tokens]: `keep` for each token in positions [kept.count], `drop` for all
/// others. Element types are those of `write_mask` of a kept_range. O(tokens).
template <class T>
constexpr void write_mask(const kept_tokens& kept, const position_t* positions, T* mask,
                          std::type_identity_t<T> keep, std::type_identity_t<T> drop) noexcept {
  for (index_t t = 0; t < kept.tokens; ++t) mask[t] = drop;
  for (index_t i = 0; i < kept.count; ++i) mask[positions[i]] = keep;
}

}  // namespace refreekv::inline v0
