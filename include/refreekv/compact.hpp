// SPDX-License-Identifier: Apache-2.0
// Makes what a decision keeps contiguous.
#pragma once

#include "refreekv/backend/backend.hpp"
#include "refreekv/cache/aliasing.hpp"
#include "refreekv/cache/fit.hpp"

namespace refreekv::inline v0 {

namespace detail {

/// Compacts each source in turn, until one fails.
template <backend Backend, class Kept, kv_source... Sources>
[[nodiscard]] status compact_all(const Backend& exec, const Kept& kept, compaction mode,
                                 const Sources&... sources) noexcept {
  (check_source<Sources>(), ...);
  status result = status::ok;
  (void)((result = ops<Backend>::compact(exec, sources, kept, mode), result == status::ok) && ...);
  return result;
}

}  // namespace detail

/// Null, or why `compact` would return invalid_argument, in words. O(tables), and of positions
/// O(kept tokens). Device tables are not looked at.
template <kv_source Source, kv_source... Others>
[[nodiscard]] constexpr const char* why_invalid(
    view<const kept_range, 2, typename Source::memory> kept, compaction mode, const Source& source,
    const Others&... others) noexcept {
  const char* why = detail::first_of({detail::unfit(kept, source), detail::unfit(kept, others)...});
  return why != nullptr ? why : detail::aliased(kept, mode, source, others...);
}
template <kv_source Source, kv_source... Others>
[[nodiscard]] constexpr const char* why_invalid(const kept_positions<typename Source::memory>& kept,
                                                compaction mode, const Source& source,
                                                const Others&... others) noexcept {
  const char* why = detail::first_of({detail::unfit(kept, source), detail::unfit(kept, others)...});
  return why != nullptr ? why : detail::aliased(kept, mode, source, others...);
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
[[nodiscard]] status compact(const Backend& exec,
                             view<const kept_range, 2, typename ops<Backend>::memory> kept,
                             compaction mode, const Sources&... sources) noexcept {
  if (why_invalid(kept, mode, sources...) != nullptr) return status::invalid_argument;
  return detail::compact_all(exec, kept, mode, sources...);
}

/// The same for positions that are no range, in ascending order. sinks_up leaves alone whatever is
/// kept in one piece at the end; suffix_down frees whole pages at a sequence's end. Where all
/// positions are there nothing is touched: this is how to leave out a sequence whose pages are
/// shared.
template <backend Backend, kv_source... Sources>
  requires(sizeof...(Sources) > 0 &&
           (std::same_as<typename Sources::memory, typename ops<Backend>::memory> && ...))
[[nodiscard]] status compact(const Backend& exec,
                             const kept_positions<typename ops<Backend>::memory>& kept,
                             compaction mode, const Sources&... sources) noexcept {
  if (why_invalid(kept, mode, sources...) != nullptr) return status::invalid_argument;
  return detail::compact_all(exec, kept, mode, sources...);
}

/// Null, or why `compact` of tokens and stand-ins would return invalid_argument, in words. As that
/// of positions.
template <kv_source Keys, kv_source... Values>
[[nodiscard]] constexpr const char* why_invalid(
    const kept_with_stand_ins<typename Keys::memory>& kept, compaction mode, const Keys& keys,
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
  return detail::aliased(kept, mode, keys, values...);
}

/// compact of positions, and the stand-ins that go with them, if any, in the sources' own type into
/// slots that dropped tokens leave: with suffix_down behind what stays, which then is the slots
/// [0, kept.length(s, h)), with sinks_up in front of it, so that the last slot stays tokens - 1.
/// Neither allocates nor synchronises.
template <backend Backend, kv_source Keys, kv_source... Values>
  requires(std::same_as<typename Keys::memory, typename ops<Backend>::memory> &&
           (std::same_as<typename Values::memory, typename Keys::memory> && ...))
[[nodiscard]] status compact(const Backend& exec,
                             const kept_with_stand_ins<typename ops<Backend>::memory>& kept,
                             compaction mode, const Keys& keys, const Values&... values) noexcept {
  using run = ops<Backend>;
  if (why_invalid(kept, mode, keys, values...) != nullptr) return status::invalid_argument;
  const kept_positions<typename Keys::memory>& positions = kept;
  status s = detail::compact_all(exec, positions, mode, keys, values...);
  if constexpr (sizeof...(Values) == 1) {
    if (!kept.stand_ins.wanted()) return s;
    const auto write = [&](const auto& source, const auto& rows) {
      if (s == status::ok) {
        s = run::write_stand_ins(exec, source, kept.counts, rows, kept.stand_ins.counts, mode);
      }
    };
    write(keys, kept.stand_ins.keys);
    (write(values, kept.stand_ins.values), ...);
  }
  return s;
}

}  // namespace refreekv::inline v0
