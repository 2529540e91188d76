// SPDX-License-Identifier: Apache-2.0
// The result of a decision that leaves single tokens and rows that stand in for dropped ones.
#pragma once

#include "refreekv/decision/compaction.hpp"
#include "refreekv/decision/kept_positions.hpp"

namespace refreekv::inline v0 {

/// Keys and values of which each stands in for several tokens of its KV head that went. To
/// attention they are tokens as all others, but that every later query sees them, past any sliding
/// window. They have no position: keys are as rotated ones are, and the next position goes on from
/// what it was.
template <class Memory = host_memory>
struct stand_in_rows {
  view<float, 4, Memory> keys;         ///< [sequence, kv_head, stand_in, head_dim]
  view<float, 4, Memory> values;       ///< [sequence, kv_head, stand_in, head_dim of the values]
  view<position_t, 2, Memory> counts;  ///< [sequence, kv_head]

  /// Where none are wanted there is no pointer.
  [[nodiscard]] constexpr bool wanted() const noexcept { return counts.data() != nullptr; }
};

/// The tokens that stay, and what stands in for the others. Kept positions alone will do for a rule
/// whose stand-ins are off. A KV head's slots in use are length(s, h), not counts(s, h).count; what
/// takes kept positions, as write_masks does, knows nothing of stand-ins. Where the cache is pruned
/// again they are tokens as others are: those of suffix_down count as recent, and those of sinks_up
/// as the first ones; positions go on from where they were, whatever stands in.
template <class Memory = host_memory>
struct kept_with_stand_ins : kept_positions<Memory> {
  stand_in_rows<Memory> stand_ins = {};

  constexpr kept_with_stand_ins() noexcept = default;
  constexpr kept_with_stand_ins(const kept_positions<Memory>& kept,
                                const stand_in_rows<Memory>& rows = {}) noexcept
      : kept_positions<Memory>(kept), stand_ins(rows) {}

  /// Slots that a KV head's tokens and stand-ins take together.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t length(index_t sequence,
                                                              index_t kv_head) const noexcept {
    return index_t{this->counts(sequence, kv_head).count} +
           (stand_ins.counts.data() == nullptr ? 0 : stand_ins.counts(sequence, kv_head));
  }
};

/// The slot of a KV head's first stand-in once `how` is done: behind the tokens that stay, or in
/// front of them where those move up.
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t first_stand_in(const kept_tokens& kept,
                                                                    index_t stand_ins,
                                                                    compaction mode) noexcept {
  return mode == compaction::sinks_up ? kept.dropped() - stand_ins : index_t{kept.count};
}

}  // namespace refreekv::inline v0
