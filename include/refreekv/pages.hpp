// SPDX-License-Identifier: Apache-2.0
// Frees the pages that decisions about a whole batch no longer need, in the decisions' memory: on
// the host or a device.
//
// An engine with pages calls, in this order and on a device in one stream: select, plan_pages,
// compact of `compact_ranges` with sinks_up, release_pages, and write_masks of `mask_ranges`.
// page_plan.hpp has the functions for one sequence on the host.
#pragma once

#include "refreekv/backend/backend.hpp"
#include "refreekv/decision/checks.hpp"

namespace refreekv::inline v0 {

namespace detail {

/// Whether `shared` has bits for `pages` pages of each sequence, or has no pointer.
template <class Memory>
[[nodiscard]] constexpr bool has_bits(const shared_pages_view<Memory>& shared, index_t sequences,
                                      index_t pages) noexcept {
  return shared.data() == nullptr ||
         (has_rows(shared, sequences) && shared.extent(1) >= (pages + 7) / 8);
}

/// Whether `values` are [sequence].
template <class T, class Memory>
[[nodiscard]] constexpr bool has_one_each(const view<T, 1, Memory>& values,
                                          index_t sequences) noexcept {
  return !values.malformed() && values.extent(0) == sequences;
}

/// Whether `lists` are of these sequences, with a place for `pages` pages of each.
template <class Index, class Memory>
[[nodiscard]] constexpr bool has_lists(const page_lists<Index, Memory>& lists, index_t sequences,
                                       index_t pages) noexcept {
  return has_rows(lists.ids, sequences) && has_one_each(lists.counts, sequences) &&
         lists.ids.extent(1) >= pages;
}

/// Whether `shared` has bits for all pages of the sequences. A device's lengths are not known, so
/// that only its shape is checked.
template <class Memory>
[[nodiscard]] constexpr bool covers(const shared_pages_view<Memory>& shared,
                                    const view<const kept_range, 2, Memory>& kept,
                                    index_t page_tokens) noexcept {
  index_t pages = 0;
  if constexpr (std::same_as<Memory, host_memory>) {
    for (index_t s = 0; s < kept.extent(0); ++s) {
      const index_t own = (kept(s, 0).tokens + page_tokens - 1) / page_tokens;
      pages = own > pages ? own : pages;
    }
  }
  return has_bits(shared, kept.extent(0), pages);
}

/// Whether the plans fit the tables with these counts. True for a device's plans, which are not
/// read.
template <class Index, class Memory>
[[nodiscard]] constexpr bool are_plans_of(const page_lists<Index, Memory>& table,
                                          const view<const page_plan, 1, Memory>& plans) noexcept {
  if constexpr (std::same_as<Memory, host_memory>) {
    for (index_t s = 0; s < plans.extent(0); ++s) {
      const page_plan& plan = plans(s);
      if (plan.first < 0 || plan.first > plan.last || plan.last > table.counts(s) ||
          table.counts(s) > table.ids.extent(1)) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace detail

/// Null, or the reason in words why `plan_pages` would return invalid_argument. O(tables).
template <class Memory>
[[nodiscard]] constexpr const char* why_invalid(
    std::type_identity_t<view<const kept_range, 2, Memory>> kept, index_t page_tokens,
    const page_plans<Memory>& to,
    const std::type_identity_t<shared_pages_view<Memory>>& shared = {}) noexcept {
  const index_t sequences = kept.extent(0);
  if (page_tokens < 1 || page_tokens > max_count) return "page_tokens must be in [1, 2^31 - 1]";
  if (const char* why = detail::unfit_ranges(kept, sequences, 1, max_count)) return why;
  if (!detail::has_one_each(to.plans, sequences)) return "plans must be [sequence]";
  if (detail::misshapen(to.compact_ranges, sequences, 1, 0) != nullptr)
    return "compact_ranges must be [sequence, 1]";
  if (detail::misshapen(to.mask_ranges, sequences, 1, 0) != nullptr) {
    return "mask_ranges must be [sequence, 1]";
  }
  if (!detail::covers(shared, kept, page_tokens)) {
    return "shared must be [sequence, (pages + 7) / 8] with contiguous rows";
  }
  return nullptr;
}

/// Plans which pages each sequence can free as a whole, and which tokens must move before:
/// plan_pages of page_plan.hpp for each sequence. Moves and frees nothing yet. kept: [sequence, 1],
/// in pages of page_tokens tokens. Heads that share pages share a range (see unite). Neither
/// allocates nor synchronises. O(dropped pages).
template <backend Backend>
[[nodiscard]] status plan_pages(
    const Backend& exec, view<const kept_range, 2, typename ops<Backend>::memory> kept,
    index_t page_tokens, const page_plans<typename ops<Backend>::memory>& to,
    shared_pages_view<typename ops<Backend>::memory> shared = {}) noexcept {
  if (why_invalid(kept, page_tokens, to, shared) != nullptr) return status::invalid_argument;
  return ops<Backend>::plan_pages(exec, kept, page_tokens, shared, to);
}

/// Null, or the reason in words why `release_pages` would return invalid_argument. O(sequences).
template <class Index, class Memory>
[[nodiscard]] constexpr const char* why_invalid(
    std::type_identity_t<view<const page_plan, 1, Memory>> plans,
    const page_lists<Index, Memory>& table, const page_lists<Index, Memory>& freed,
    const std::type_identity_t<shared_pages_view<Memory>>& shared = {}) noexcept {
  const index_t sequences = plans.extent(0), pages = table.ids.extent(1);
  if (!detail::has_one_each(plans, sequences)) return "plans must be [sequence]";
  if (!detail::has_lists(table, sequences, 0)) {
    return "table needs ids [sequence, page] with contiguous rows, and counts [sequence]";
  }
  if (!detail::has_lists(freed, sequences, pages)) {
    return "freed needs ids [sequence, page] as the table's, and counts [sequence]";
  }
  if (!detail::has_bits(shared, sequences, pages)) {
    return "shared must be [sequence, (pages + 7) / 8] with contiguous rows";
  }
  if (!detail::are_plans_of(table, plans)) return "a plan is not of its sequence's table";
  return nullptr;
}

/// Removes the plans' pages from the sequences' tables: the ids after them shift down and counts
/// shrink. Writes the pages that nobody shares to `freed`; the caller may reuse them. A row of
/// `freed` is as long as a row of the table. Entries past a count are unchanged, in `freed` and in
/// the table. Requires that a null block in place of pages that left a sliding window is marked as
/// shared.
/// plans: as plan_pages wrote them; shared: as plan_pages read it. Requires that the
/// `compact_ranges` of plan_pages have been compacted. Neither allocates nor synchronises.
/// O(pages).
template <backend Backend, class Index>
  requires(std::same_as<Index, std::int32_t> || std::same_as<Index, std::int64_t>)
[[nodiscard]] status release_pages(
    const Backend& exec, view<const page_plan, 1, typename ops<Backend>::memory> plans,
    const page_lists<Index, typename ops<Backend>::memory>& table,
    const page_lists<Index, typename ops<Backend>::memory>& freed,
    shared_pages_view<typename ops<Backend>::memory> shared = {}) noexcept {
  if (why_invalid(plans, table, freed, shared) != nullptr) return status::invalid_argument;
  return ops<Backend>::release_pages(exec, plans, shared, table, freed);
}

}  // namespace refreekv::inline v0
