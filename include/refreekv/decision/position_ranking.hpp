// SPDX-License-Identifier: Apache-2.0
// The ranking of tokens by position: sinks first, then newest to oldest.
#pragma once

#include "refreekv/decision/kept_range.hpp"

namespace refreekv::inline v0 {

/// Rank 0 is kept first. Positions in rank order: 0 .. sinks-1, then tokens-1, tokens-2, ..., sinks
/// (arXiv 2502.16886, section 2.3). Any number of best tokens is a prefix and a suffix.
class position_ranking {
 public:
  REFREEKV_HOST_DEVICE constexpr position_ranking(index_t tokens, index_t sinks) noexcept
      : tokens_(tokens), sinks_(sinks < tokens ? sinks : tokens) {}

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t sinks() const noexcept { return sinks_; }

  /// The position of the token with that rank. Requires 0 <= rank < tokens.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t position(index_t rank) const noexcept {
    return rank < sinks_ ? rank : tokens_ - 1 - (rank - sinks_);
  }

  /// Keeps the `count` best tokens. All sinks stay even if `count` is smaller, and at least one
  /// token stays. Keeps all tokens if `count` exceeds them.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr kept_range best(index_t count) const noexcept {
    const index_t suffix = (count > 0 ? count : 1) - sinks_;
    if (suffix >= tokens_ - sinks_) return all();
    return from(suffix > 0 ? tokens_ - suffix : tokens_);
  }

  /// Keeps all tokens.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr kept_range all() const noexcept {
    return from(sinks_);
  }

  /// Keeps all tokens because no decision is possible. Sets `undecided` if there are candidates.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr kept_range undecided() const noexcept {
    kept_range kept = all();
    kept.undecided = tokens_ > sinks_;
    return kept;
  }

  /// Keeps the sinks and all tokens from position `cut` on. Requires sinks() <= cut <= tokens.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr kept_range from(index_t cut) const noexcept {
    return {static_cast<position_t>(sinks_), static_cast<position_t>(cut),
            static_cast<position_t>(tokens_)};
  }

 private:
  index_t tokens_;
  index_t sinks_;
};

}  // namespace refreekv::inline v0
