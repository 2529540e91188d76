// SPDX-License-Identifier: Apache-2.0
// The result of a decision that keeps single tokens, and adds rows that stand in for dropped ones.
#pragma once

#include "refreekv/decision/compaction.hpp"
#include "refreekv/decision/kept_positions.hpp"

namespace refreekv::inline v0 {

/// Stand-ins: key and value rows that each replace several dropped tokens of a KV head. Attention
/// treats them as tokens, except that every later query sees them, even past a sliding window. They
/// have no position: their keys are used as rotated keys are, and the next position is unchanged.
template <class Memory = host_memory>
struct stand_in_rows {
  view<float, 4, Memory> keys;         ///< [sequence, kv_head, stand_in, head_dim]
  view<float, 4, Memory> values;       ///< [sequence, kv_head, stand_in, head_dim of the values]
  view<position_t, 2, Memory> counts;  ///< [sequence, kv_head]

  /// Whether stand-ins are wanted. A null pointer of the counts means none.
  [[nodiscard]] constexpr bool wanted() const noexcept { return counts.data() != nullptr; }
};

/// The kept tokens and the stand-ins for the dropped ones. Kept positions alone suffice for a
/// policy with its stand-ins off. A KV head uses length(s, h) slots, not counts(s, h).count.
/// Functions of kept positions, such as write_masks, ignore stand-ins. If the cache is pruned
/// again, stand-ins count as ordinary tokens: after suffix_down as recent ones, after sinks_up as
/// the first ones. Positions continue as if there were no stand-ins.
template <class Memory = host_memory>
struct kept_with_stand_ins : kept_positions<Memory> {
  stand_in_rows<Memory> stand_ins = {};

  constexpr kept_with_stand_ins() noexcept = default;
  constexpr kept_with_stand_ins(const kept_positions<Memory>& kept,
                                const stand_in_rows<Memory>& rows = {}) noexcept
      : kept_positions<Memory>(kept), stand_ins(rows) {}

  /// Number of slots that the kept tokens and the stand-ins of a KV head use together.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t length(index_t sequence,
                                                              index_t kv_head) const noexcept {
    return index_t{this->counts(sequence, kv_head).count} +
           (stand_ins.counts.data() == nullptr ? 0 : stand_ins.counts(sequence, kv_head));
  }
};

/// The slot of the first stand-in of a KV head after a compaction in `mode`. Stand-ins are behind
/// the kept tokens, or in front of them with sinks_up.
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t first_stand_in(const kept_tokens& kept,
                                                                    index_t stand_ins,
                                                                    compaction mode) noexcept {
  return mode == compaction::sinks_up ? kept.dropped() - stand_ins : index_t{kept.count};
}

}  // namespace refreekv::inline v0
