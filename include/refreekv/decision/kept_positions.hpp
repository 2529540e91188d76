// SPDX-License-Identifier: Apache-2.0
// What a decision leaves of a sequence where it is not a range: the tokens themselves.
#pragma once

#include "refreekv/decision/kept_range.hpp"

namespace refreekv::inline v0 {

/// How many tokens of a sequence stay; the names are kept_range's.
struct kept_tokens {
  position_t count = 0;
  position_t tokens = 0;
  /// There was nothing to decide on: NaN or Inf in a query or a key, or no row. All tokens stay, as
  /// they may have done anyway.
  bool undecided = false;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr position_t length() const noexcept { return count; }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr position_t dropped() const noexcept {
    return tokens - count;
  }
  /// If the cache had been pruned before, as it is at each step of an eviction, add what was
  /// dropped then.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr position_t next_position() const noexcept {
    return tokens;
  }
  [[nodiscard]] constexpr double kept_fraction() const noexcept {
    return tokens == 0 ? 1.0 : static_cast<double>(count) / tokens;
  }
  friend constexpr bool operator==(const kept_tokens&, const kept_tokens&) noexcept = default;
};

/// The tokens that stay of every KV head of every sequence.
template <class Memory = host_memory>
struct kept_positions {
  /// [sequence, kv_head, capacity]: the first counts(s, h).count of a row, ascending; what follows
  /// them is undefined.
  view<position_t, 3, Memory> positions;
  view<kept_tokens, 2, Memory> counts;  ///< [sequence, kv_head]
};

/// A mask of one value for each token, mask [kept.tokens], from positions [kept.count]: see
/// write_mask of a kept_range. O(tokens).
template <class T>
constexpr void write_mask(const kept_tokens& kept, const position_t* positions, T* mask,
                          std::type_identity_t<T> keep, std::type_identity_t<T> drop) noexcept {
  for (index_t t = 0; t < kept.tokens; ++t) mask[t] = drop;
  for (index_t i = 0; i < kept.count; ++i) mask[positions[i]] = keep;
}

}  // namespace refreekv::inline v0
