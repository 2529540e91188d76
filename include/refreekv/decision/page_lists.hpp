// SPDX-License-Identifier: Apache-2.0
// The page lists and page plans of a batch.
#pragma once

#include "refreekv/decision/compaction.hpp"
#include "refreekv/decision/page_plan.hpp"

namespace refreekv::inline v0 {

/// The pages of each sequence, oldest first. Entries of a row past counts(sequence) are padding.
template <class Index, class Memory = host_memory>
struct page_lists {
  view<Index, 2, Memory> ids;          ///< [sequence, page], rows contiguous; int32 or int64
  view<position_t, 1, Memory> counts;  ///< [sequence]
};

/// The shared_pages of each sequence: [sequence, (pages + 7) / 8] bytes, rows contiguous. A null
/// pointer means that no page is shared.
template <class Memory = host_memory>
using shared_pages_view = view<const std::uint8_t, 2, Memory>;

/// The result of plan_pages for each sequence.
template <class Memory = host_memory>
struct page_plans {
  view<page_plan, 1, Memory> plans;  ///< [sequence], for release_pages
  /// [sequence, 1], for compact with sinks_up: ranges that drop nothing where sinks stay.
  kept_ranges<Memory> compact_ranges;
  kept_ranges<Memory> mask_ranges;  ///< [sequence, 1], for write_masks: see kept_slots
};

/// The kept range in slots of the page table after the plan's pages are removed. Slots [0, tokens)
/// are in use; the next token is appended to them. Attention must mask the slots that the range
/// drops. Positions still continue from kept.next_position(). O(1).
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr kept_range kept_slots(const kept_range& kept,
                                                                   const page_plan& plan,
                                                                   index_t page_tokens) noexcept {
  kept_range left = kept;
  if (plan.sinks_move || kept.sinks == 0) {
    left.sinks = 0;
    left.cut = static_cast<position_t>(plan.first_slot);
  } else if (kept.cut < kept.tokens) {
    left.cut -= static_cast<position_t>((plan.last - plan.first) * page_tokens);
  } else if (plan.first < plan.last) {
    left.cut = static_cast<position_t>(plan.first * page_tokens);  // all slots of the sinks' pages
  }
  left.tokens = left.cut + (kept.length() - left.sinks);
  return left;
}

namespace detail {

/// The range that `compact` with sinks_up needs for a plan.
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr kept_range sink_moves(const kept_range& kept,
                                                                   const page_plan& plan) noexcept {
  return plan.sinks_move ? kept : kept_range{kept.sinks, kept.sinks, kept.tokens};
}

template <class Memory>
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr shared_pages shared_by(
    const shared_pages_view<Memory>& shared, index_t sequence) noexcept {
  return shared.data() == nullptr ? nullptr : shared.at(sequence);
}

}  // namespace detail

}  // namespace refreekv::inline v0
