// SPDX-License-Identifier: Apache-2.0
// How a compaction makes kept tokens contiguous, and which tokens it moves.
#pragma once

#include "refreekv/decision/kept_range.hpp"

namespace refreekv::inline v0 {

/// How a compaction makes kept tokens contiguous. Stored keys are already rotated, so the order of
/// slots does not matter to attention.
enum class compaction {
  sinks_up,     ///< kept tokens move up to the suffix: the last slot stays tokens - 1 (ours)
  suffix_down,  ///< kept tokens move down to slot 0 and on
};

/// Copies tokens [source, source + tokens) to [target, target + tokens). The two may overlap: the
/// copy acts as if through a buffer.
struct token_move {
  index_t source;
  index_t target;  ///< <= source for suffix_down, so that copying in ascending order is safe
  index_t tokens;
};

/// The move that makes a kept range contiguous; its `tokens` is 0 if nothing is dropped. O(1).
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_move move_of(const kept_range& kept,
                                                                compaction mode) noexcept {
  const index_t sinks = kept.sinks, cut = kept.cut, tokens = kept.tokens;
  if (mode == compaction::sinks_up) return {0, cut - sinks, cut == sinks ? 0 : sinks};
  return {cut, sinks, cut == sinks ? 0 : tokens - cut};
}

/// The slot of the first kept token, of a kept_range or kept_tokens, after a compaction in `mode`.
/// The other kept tokens follow it.
template <class Kept>
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t first_slot(const Kept& kept,
                                                                compaction mode) noexcept {
  return mode == compaction::sinks_up ? index_t{kept.dropped()} : 0;
}

}  // namespace refreekv::inline v0
