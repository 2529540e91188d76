// SPDX-License-Identifier: Apache-2.0
// How what is kept becomes contiguous: which tokens move where.
#pragma once

#include "refreekv/decision/kept_range.hpp"

namespace refreekv::inline v0 {

/// How what is kept becomes contiguous. Keys carry their own rotation, so the order of slots does
/// not matter to attention.
enum class compaction {
  sinks_up,     ///< what precedes the suffix moves up to it: the last slot stays tokens - 1 (ours)
  suffix_down,  ///< what stays moves down to slot 0
};

/// Copy tokens [source, source + tokens) to [target, target + tokens), as if through a buffer.
struct token_move {
  index_t source;
  index_t target;  ///< <= source for suffix_down: safe in ascending order
  index_t tokens;
};

[[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_move move_of(const kept_range& kept,
                                                                compaction mode) noexcept {
  const index_t sinks = kept.sinks, cut = kept.cut, tokens = kept.tokens;
  if (mode == compaction::sinks_up) return {0, cut - sinks, cut == sinks ? 0 : sinks};
  return {cut, sinks, cut == sinks ? 0 : tokens - cut};
}

/// The slot of the first kept token of a kept_range or kept_tokens once `how` is done; the others
/// follow it.
template <class Kept>
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t first_slot(const Kept& kept,
                                                                compaction mode) noexcept {
  return mode == compaction::sinks_up ? index_t{kept.dropped()} : 0;
}

}  // namespace refreekv::inline v0
