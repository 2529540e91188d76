// SPDX-License-Identifier: Apache-2.0
// The library's verbs: select, compact, and prune, which is both.
#pragma once

#include "refreekv/aliasing.hpp"
#include "refreekv/fit.hpp"
#include "refreekv/policy.hpp"

namespace refreekv::inline v0 {

/// Null, or why `select` would return invalid_argument, in words that name the culprit.
/// O(tables). Device tables are not looked at.
template <class Policy, observation Seen>
[[nodiscard]] constexpr const char* why_invalid(
    const Policy& rule, const Seen& seen,
    const decision_of<Policy, typename Seen::memory>& kept) noexcept {
  if (const char* why = rule.invalid()) return why;
  if (const char* why = seen.invalid()) return why;
  if (const char* why = rule.invalid(seen)) return why;
  if constexpr (requires { rule.invalid(seen, kept); }) {
    if (const char* why = rule.invalid(seen, kept)) return why;
  }
  return detail::misshapen(kept, seen.sequences(), groups_of(rule, seen), seen.capacity());
}

/// Bytes that `select` needs. Depends on extents and options, and on whether rows have ends, not on
/// lengths or tables: a workspace
/// for the largest batch and capacity serves all. 0 where `rule` or `seen` is invalid(), the
/// largest size there is where no memory could hold it. O(tables).
template <class Policy, backend Backend, observation Seen>
  requires policy_for<Policy, Backend, Seen>
[[nodiscard]] std::size_t workspace_size(const Policy& rule, const Backend& on,
                                         const Seen& seen) noexcept {
  if (rule.invalid() != nullptr || seen.invalid() != nullptr) return 0;
  arena count;
  (void)detail::method_of(rule, seen).take(count, on, seen);
  return count.bytes();
}

/// Decides what stays of each sequence of one layer; nothing is moved yet.
/// kept: kept_ranges [sequence, group], with groups 1 or kv_heads as the policy says, or
/// kept_positions, whichever the policy's decision is. Sequences do not influence each other.
/// `join` sums over tensor-parallel ranks what they decide on together, and gives context-parallel
/// ones what each has found; a shard's decision is about all of its sequence, see own_ranges.
/// Neither allocates nor synchronises.
template <class Policy, backend Backend, observation Seen, joins<Seen> Join = no_reduction>
  requires policy_for<Policy, Backend, Seen> &&
           std::same_as<typename Seen::memory, typename ops<Backend>::memory>
[[nodiscard]] status select(const Policy& rule, const Backend& on, const Seen& seen,
                            const decision_of<Policy, typename Seen::memory>& kept,
                            workspace<typename Seen::memory> scratch,
                            const Join& join = {}) noexcept {
  if (why_invalid(rule, seen, kept) != nullptr) return status::invalid_argument;
  const auto& method = detail::method_of(rule, seen);
  arena count;
  (void)method.take(count, on, seen);
  if (scratch.bytes < count.bytes() || (count.bytes() != 0 && scratch.data == nullptr)) {
    return status::small_workspace;
  }
  arena carve(scratch.data);
  return method.select(on, seen, method.take(carve, on, seen), kept, join);
}

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

/// Compacts each source in turn, until one fails.
template <backend Backend, class Kept, kv_source... Sources>
[[nodiscard]] status compact_all(const Backend& on, const Kept& kept, compaction how,
                                 const Sources&... sources) noexcept {
  (check_source<Sources>(), ...);
  status result = status::ok;
  (void)((result = ops<Backend>::compact(on, sources, kept, how), result == status::ok) && ...);
  return result;
}

}  // namespace detail

/// Null, or why `compact` would return invalid_argument, in words. O(tables), and of positions
/// O(kept tokens). Device tables are not looked at.
template <kv_source Source, kv_source... Others>
[[nodiscard]] constexpr const char* why_invalid(
    view<const kept_range, 2, typename Source::memory> kept, compaction how, const Source& source,
    const Others&... others) noexcept {
  const char* why = detail::first_of({detail::unfit(kept, source), detail::unfit(kept, others)...});
  return why != nullptr ? why : detail::aliased(kept, how, source, others...);
}
template <kv_source Source, kv_source... Others>
[[nodiscard]] constexpr const char* why_invalid(const kept_positions<typename Source::memory>& kept,
                                                compaction how, const Source& source,
                                                const Others&... others) noexcept {
  const char* why = detail::first_of({detail::unfit(kept, source), detail::unfit(kept, others)...});
  return why != nullptr ? why : detail::aliased(kept, how, source, others...);
}

/// Makes what is kept contiguous in each source (keys, values, scales ...), in place:
/// afterwards the kept tokens of a (sequence, kv_head) are its slots
/// [first_slot(kept, how), first_slot(kept, how) + kept.length()), sinks first.
/// kept: [sequence, 1 or kv_head], as `select` wrote it; where sinks == cut nothing is touched, so
/// this is how to leave a sequence out: one whose page_plan moves no sinks because others share its
/// pages, say.
/// Memory that moves is named once: where values are the keys' own memory, or a part of each key
/// (MLA), the keys are passed alone; so is one of several heads, layers or sequences that are one
/// cache, and a page that is written is in one table, once. What a host can see of that is refused;
/// null blocks in place of tokens that a sliding window has left behind are no fault as long as
/// they are not written: with sinks_up, or a rule of no sinks. Neither allocates nor synchronises.
template <backend Backend, kv_source... Sources>
  requires(sizeof...(Sources) > 0 &&
           (std::same_as<typename Sources::memory, typename ops<Backend>::memory> && ...))
[[nodiscard]] status compact(const Backend& on,
                             view<const kept_range, 2, typename ops<Backend>::memory> kept,
                             compaction how, const Sources&... sources) noexcept {
  if (why_invalid(kept, how, sources...) != nullptr) return status::invalid_argument;
  return detail::compact_all(on, kept, how, sources...);
}

/// The same for positions that are no range, in ascending order. sinks_up leaves alone whatever is
/// kept in one piece at the end; suffix_down frees whole pages at a sequence's end. Where all
/// positions are there nothing is touched: this is how to leave out a sequence whose pages are
/// shared.
template <backend Backend, kv_source... Sources>
  requires(sizeof...(Sources) > 0 &&
           (std::same_as<typename Sources::memory, typename ops<Backend>::memory> && ...))
[[nodiscard]] status compact(const Backend& on,
                             const kept_positions<typename ops<Backend>::memory>& kept,
                             compaction how, const Sources&... sources) noexcept {
  if (why_invalid(kept, how, sources...) != nullptr) return status::invalid_argument;
  return detail::compact_all(on, kept, how, sources...);
}

/// Null, or why `compact` of tokens and stand-ins would return invalid_argument, in words. As that
/// of positions.
template <kv_source Keys, kv_source... Values>
[[nodiscard]] constexpr const char* why_invalid(
    const kept_with_stand_ins<typename Keys::memory>& kept, compaction how, const Keys& keys,
    const Values&... values) noexcept {
  if (const char* why =
          detail::first_of({detail::unfit(kept, keys), detail::unfit(kept, values)...})) {
    return why;
  }
  if (kept.stand_ins.wanted()) {
    if constexpr (sizeof...(Values) != 1) {
      return "stand-ins are keys and values: pass the sources of both, and no others";
    } else if (const char* why = detail::unfit(kept, keys, values...)) {
      return why;
    }
  }
  return detail::aliased(kept, how, keys, values...);
}

/// compact of positions, and the stand-ins that go with them, if any, in the sources' own type into
/// slots that dropped tokens leave: with suffix_down behind what stays, which then is the slots
/// [0, kept.length(s, h)), with sinks_up in front of it, so that the last slot stays tokens - 1.
/// Neither allocates nor synchronises.
template <backend Backend, kv_source Keys, kv_source... Values>
  requires(std::same_as<typename Keys::memory, typename ops<Backend>::memory> &&
           (std::same_as<typename Values::memory, typename Keys::memory> && ...))
[[nodiscard]] status compact(const Backend& on,
                             const kept_with_stand_ins<typename ops<Backend>::memory>& kept,
                             compaction how, const Keys& keys, const Values&... values) noexcept {
  using run = ops<Backend>;
  if (why_invalid(kept, how, keys, values...) != nullptr) return status::invalid_argument;
  const kept_positions<typename Keys::memory>& positions = kept;
  status s = detail::compact_all(on, positions, how, keys, values...);
  if constexpr (sizeof...(Values) == 1) {
    if (!kept.stand_ins.wanted()) return s;
    const auto write = [&](const auto& source, const auto& rows) {
      if (s == status::ok) {
        s = run::write_stand_ins(on, source, kept.counts, rows, kept.stand_ins.counts, how);
      }
    };
    write(keys, kept.stand_ins.keys);
    (write(values, kept.stand_ins.values), ...);
  }
  return s;
}

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
