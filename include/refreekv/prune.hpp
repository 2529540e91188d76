// SPDX-License-Identifier: Apache-2.0
// Decides what stays of each sequence of a layer, and makes it contiguous.
#pragma once

#include "refreekv/compact.hpp"
#include "refreekv/select.hpp"

namespace refreekv::inline v0 {

namespace detail {

/// What a decision looks like to those that only read it.
template <class Memory>
[[nodiscard]] constexpr view<const kept_range, 2, Memory> to_read(
    const kept_ranges<Memory>& kept) noexcept {
  return kept;
}
template <class Memory>
[[nodiscard]] constexpr const kept_positions<Memory>& to_read(
    const kept_positions<Memory>& kept) noexcept {
  return kept;
}

}  // namespace detail

/// Null, or why `prune` would return invalid_argument before it decides, in words: where it is
/// given values the two verbs differ. O(tables).
template <class Policy, observation Seen, kv_source Value, kv_source... Values>
  requires requires(const Seen& seen) { seen.keys; }
[[nodiscard]] constexpr const char* why_invalid(
    const Policy& rule, const Seen& seen, const decision_of<Policy, typename Seen::memory>& kept,
    const Value& value, const Values&... values) noexcept {
  if (const char* why = why_invalid(rule, seen, kept)) return why;
  const char* why =
      detail::first_of({detail::differ(value, seen.keys), detail::differ(values, seen.keys)...});
  return why != nullptr ? why : detail::share_memory(seen.keys, value, values...);
}

/// select, then compact of the observed keys and of `values` (none, or any number of sources that
/// hold the same sequences, and other memory than the keys). Ranks that share heads call the two
/// themselves, to pass a reduction. Where a decision would write memory twice, a page that is in
/// two tables, say, the result is invalid_argument as ever, but `kept` has been written; the cache
/// has not. Then why_invalid(kept, how, keys, values...) says why.
template <class Policy, backend Backend, observation Seen, kv_source... Values>
  requires policy_for<Policy, Backend, Seen> && requires(const Seen& seen) {
    requires kv_source<std::remove_cvref_t<decltype(seen.keys)>>;
  }
[[nodiscard]] status prune(const Policy& rule, const Backend& on, const Seen& seen,
                           const decision_of<Policy, typename Seen::memory>& kept,
                           workspace<typename Seen::memory> scratch, compaction how,
                           const Values&... values) noexcept {
  if (why_invalid(rule, seen, kept, values...) != nullptr) return status::invalid_argument;
  const status selected = select(rule, on, seen, kept, scratch);
  if (selected != status::ok) return selected;
  if constexpr (requires { kept.stand_ins; }) {
    return compact(on, kept, how, seen.keys, values...);
  } else {
    const auto& decided = detail::to_read(kept);
    if (detail::aliased(decided, how, seen.keys, values...) != nullptr) {
      return status::invalid_argument;
    }
    return detail::compact_all(on, decided, how, seen.keys, values...);
  }
}

/// The same of an observation that has its values, which are compacted with the keys, stand-ins
/// included; values that are a part of the keys move with them.
template <class Policy, backend Backend, observation Seen>
  requires policy_for<Policy, Backend, Seen> && requires(const Seen& seen) { seen.values; }
[[nodiscard]] status prune(const Policy& rule, const Backend& on, const Seen& seen,
                           const decision_of<Policy, typename Seen::memory>& kept,
                           workspace<typename Seen::memory> scratch, compaction how) noexcept {
  const status selected = select(rule, on, seen, kept, scratch);
  if (selected != status::ok) return selected;
  return detail::share_memory(seen.keys, seen.values) == nullptr
             ? compact(on, kept, how, seen.keys, seen.values)
             : compact(on, kept, how, seen.keys);
}

}  // namespace refreekv::inline v0
