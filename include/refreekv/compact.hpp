// SPDX-License-Identifier: Apache-2.0
// Makes the tokens that a decision keeps contiguous.
#pragma once

#include "refreekv/backend/backend.hpp"
#include "refreekv/cache/aliasing.hpp"
#include "refreekv/cache/fit.hpp"

namespace refreekv::inline v0 {

namespace detail {

/// Compacts each source in turn. Stops at the first failure and returns it.
template <backend Backend, class Kept, kv_source... Sources>
[[nodiscard]] status compact_all(const Backend& exec, const Kept& kept, compaction mode,
                                 const Sources&... sources) noexcept {
  (check_source<Sources>(), ...);
  status result = status::ok;
  (void)((result = ops<Backend>::compact(exec, sources, kept, mode), result == status::ok) && ...);
  return result;
}

/// Null, or that a decision does not fit a source, or that compacting would write memory twice.
template <class Kept, kv_source... Sources>
[[nodiscard]] constexpr const char* why_not_compacted(const Kept& kept, compaction mode,
                                                      const Sources&... sources) noexcept {
  const char* why = first_of({unfit(kept, sources)...});
  return why != nullptr ? why : aliased(kept, mode, sources...);
}

}  // namespace detail

/// Null, or the reason in words why `compact` would return invalid_argument. O(tables), and for
/// positions also O(kept tokens). Device tables are not read.
template <kv_source Source, kv_source... Others>
[[nodiscard]] constexpr const char* why_invalid(
    view<const kept_range, 2, typename Source::memory> kept, compaction mode, const Source& source,
    const Others&... others) noexcept {
  return detail::why_not_compacted(kept, mode, source, others...);
}
template <kv_source Source, kv_source... Others>
[[nodiscard]] constexpr const char* why_invalid(const kept_positions<typename Source::memory>& kept,
                                                compaction mode, const Source& source,
                                                const Others&... others) noexcept {
  return detail::why_not_compacted(kept, mode, source, others...);
}

/// Makes the kept tokens contiguous in each source (keys, values, scales ...), in place. Afterwards
/// the kept tokens of a (sequence, kv_head) are its slots [first_slot(kept, mode), first_slot(kept,
/// mode) + kept.length()), sinks first.
/// kept: [sequence, 1 or kv_head], as `select` wrote it. A sequence with sinks == cut is not
/// touched. Use this to leave a sequence out, for example one whose page_plan moves no sinks
/// because other sequences share its pages.
/// Requires that memory that moves is named once:
/// - Where values are the keys' own memory, or a part of each key (MLA), pass the keys alone.
/// - Where several heads, layers or sequences are one cache, pass one of them.
/// - A page that is written is in one table, once.
/// Returns invalid_argument for each violation that a host can see. Null blocks in place of tokens
/// that left a sliding window are allowed if they are not written: with sinks_up, or with a policy
/// without sinks. Neither allocates nor synchronises.
template <backend Backend, kv_source... Sources>
  requires(sizeof...(Sources) > 0 &&
           (std::same_as<typename Sources::memory, typename ops<Backend>::memory> && ...))
[[nodiscard]] status compact(const Backend& exec,
                             view<const kept_range, 2, typename ops<Backend>::memory> kept,
                             compaction mode, const Sources&... sources) noexcept {
  if (why_invalid(kept, mode, sources...) != nullptr) return status::invalid_argument;
  return detail::compact_all(exec, kept, mode, sources...);
}

/// As `compact` of ranges, but for positions that need not be a range, in ascending order. sinks_up
/// does not touch the tokens that are kept in one piece at the end. suffix_down frees whole pages
/// at a sequence's end. A sequence that keeps all positions is not touched: use this to leave out a
/// sequence whose pages are shared. Neither allocates nor synchronises.
template <backend Backend, kv_source... Sources>
  requires(sizeof...(Sources) > 0 &&
           (std::same_as<typename Sources::memory, typename ops<Backend>::memory> && ...))
[[nodiscard]] status compact(const Backend& exec,
                             const kept_positions<typename ops<Backend>::memory>& kept,
                             compaction mode, const Sources&... sources) noexcept {
  if (why_invalid(kept, mode, sources...) != nullptr) return status::invalid_argument;
  return detail::compact_all(exec, kept, mode, sources...);
}

/// Null, or the reason in words why `compact` of tokens and stand-ins would return
/// invalid_argument. Complexity as for positions.
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

/// Compacts positions, as `compact` of positions, then writes their stand-ins, if any. Stand-ins
/// are converted to the sources' own type and written into slots of dropped tokens. With
/// suffix_down they follow the kept tokens, and both are the slots [0, kept.length(s, h)). With
/// sinks_up they precede the kept tokens, so that the last slot stays tokens - 1. Neither allocates
/// nor synchronises.
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
