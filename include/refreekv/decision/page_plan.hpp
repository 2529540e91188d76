// SPDX-License-Identifier: Apache-2.0
// Which whole pages a sequence can give up.
#pragma once

#include "refreekv/decision/kept_range.hpp"

namespace refreekv::inline v0 {

/// Bits of the pages that others use, too: these must be neither written nor freed. Bit i, lowest
/// first, is page i of the sequence. Null if no page is shared.
using shared_pages = const std::uint8_t*;

/// Whether others use a page, too. O(1).
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool is_shared(shared_pages shared,
                                                            index_t page) noexcept {
  return shared != nullptr && (shared[page / 8] >> (page % 8) & 1) != 0;
}

/// The pages that a sequence can give up whole. Pages are numbered along the sequence: page i holds
/// tokens [i * page_tokens, (i + 1) * page_tokens).
struct page_plan {
  index_t first = 0;  ///< pages [first, last) leave the sequence's page table
  index_t last = 0;   ///< the table loses last - first entries
  index_t freed = 0;  ///< number of these pages that nobody shares
  /// True: compact with sinks_up first. False: sinks stay in their page, and tokens between them
  /// and the cut must be masked.
  bool sinks_move = false;
  index_t first_slot = 0;  ///< slot of the first kept token in the new table
  /// Sinks move to pages [written_first, written_last) of the old table; empty if they stay. A
  /// prefix cache must drop the hashes of these pages. To keep offering them, it must mark
  /// them as shared before planning. Freed pages are not written, so their hashes still hold.
  index_t written_first = 0;
  index_t written_last = 0;
};

namespace detail {

/// The two plans that plan_pages chooses from. Their `freed` is not set yet.
struct page_choice {
  page_plan stay = {};
  page_plan move = {};

  /// Returns `move` if it frees more pages and writes no shared page, else `stay`. Requires the
  /// numbers of unshared pages: removed by `stay`, removed by `move`, and written by `move`.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr page_plan best(
      index_t stay_private, index_t move_private, index_t written_private) const noexcept {
    const bool moves =
        written_private == move.written_last - move.written_first && move_private > stay_private;
    page_plan plan = moves ? move : stay;
    plan.freed = moves ? move_private : stay_private;
    return plan;
  }
};

/// Plans with the sinks in place and with the sinks moved. O(1).
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr page_choice choose_pages(
    const kept_range& kept, index_t page_tokens) noexcept {
  const index_t sinks = kept.sinks, cut = kept.cut;
  const auto pages = [&](index_t tokens) { return (tokens + page_tokens - 1) / page_tokens; };
  if (sinks == cut) return {};
  const index_t first = pages(sinks), last = cut < kept.tokens ? cut / page_tokens : pages(cut);
  page_choice choice{.stay = {.first = first, .last = last < first ? first : last}};
  if (sinks == 0) {
    choice.stay.first_slot = cut < kept.tokens ? cut % page_tokens : 0;
  } else {
    const index_t target = cut - sinks;
    choice.move = {.last = target / page_tokens,
                   .sinks_move = true,
                   .first_slot = target % page_tokens,
                   .written_first = target / page_tokens,
                   .written_last = pages(cut)};
  }
  return choice;
}

/// Number of pages in [first, last) that nobody shares. O(last - first).
[[nodiscard]] constexpr index_t private_pages(shared_pages shared, index_t first,
                                              index_t last) noexcept {
  if (shared == nullptr) return last - first;
  index_t count = 0;
  for (index_t page = first; page < last; ++page) count += is_shared(shared, page) ? 0 : 1;
  return count;
}

}  // namespace detail

/// Plans which pages a sequence gives up. The sinks move if that frees more pages and writes no
/// shared page. Requires page_tokens >= 1. O(dropped pages). (ours)
[[nodiscard]] constexpr page_plan plan_pages(const kept_range& kept, index_t page_tokens,
                                             shared_pages shared = nullptr) noexcept {
  const detail::page_choice choice = detail::choose_pages(kept, page_tokens);
  const auto count = [&](index_t first, index_t last) {
    return detail::private_pages(shared, first, last);
  };
  return choice.best(count(choice.stay.first, choice.stay.last), count(0, choice.move.last),
                     count(choice.move.written_first, choice.move.written_last));
}

/// Removes the plan's pages from table [page], which has `pages` entries; later entries shift down.
/// Appends the unshared ones to `freed` [plan.freed]: the caller may reuse them. Returns their
/// number. O(pages).
template <class Index>
constexpr index_t remove_pages(const page_plan& plan, Index* table, index_t pages, Index* freed,
                               shared_pages shared = nullptr) noexcept {
  index_t count = 0;
  for (index_t page = plan.first; page < plan.last; ++page) {
    if (!is_shared(shared, page)) freed[count++] = table[page];
  }
  for (index_t page = plan.last; page < pages; ++page) {
    table[plan.first + page - plan.last] = table[page];
  }
  return count;
}

}  // namespace refreekv::inline v0
