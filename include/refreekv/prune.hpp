// SPDX-License-Identifier: Apache-2.0
// The library's verbs: select, compact, and prune, which is both.
#pragma once

#include "refreekv/policy.hpp"

namespace refreekv::inline v0 {

namespace detail {

/// Null, or in what a decision does not have the shape that it needs.
template <class Memory>
[[nodiscard]] constexpr const char* misshapen(const kept_ranges<Memory>& kept, index_t sequences,
                                              index_t groups, index_t) noexcept {
  if (kept.malformed() || kept.extent(0) != sequences || kept.extent(1) != groups) {
    return "kept must be [sequence, group]; groups are the policy's: 1 or kv_heads";
  }
  return nullptr;
}
template <class Memory>
[[nodiscard]] constexpr const char* misshapen(const kept_positions<Memory>& kept, index_t sequences,
                                              index_t groups, index_t capacity) noexcept {
  const auto& [positions, counts] = kept;
  if (counts.malformed() || counts.extent(0) != sequences || counts.extent(1) != groups) {
    return "kept counts must be [sequence, kv_head]";
  }
  if (positions.malformed() || positions.extent(0) != sequences || positions.extent(1) != groups ||
      positions.extent(2) < capacity) {
    return "kept positions must be [sequence, kv_head, capacity]";
  }
  return nullptr;
}

}  // namespace detail

/// Null, or why `select` would return invalid_argument, in words that name the culprit.
/// O(tables). Device tables are not looked at.
template <class Policy, observation Seen>
[[nodiscard]] constexpr const char* why_invalid(
    const Policy& rule, const Seen& seen,
    const decision_of<Policy, typename Seen::memory>& kept) noexcept {
  if (const char* why = rule.invalid()) return why;
  if (const char* why = seen.invalid()) return why;
  if (const char* why = rule.invalid(seen)) return why;
  return detail::misshapen(kept, seen.sequences(), groups_of(rule, seen), seen.capacity());
}

/// Bytes that `select` needs. Depends on extents and options, not on lengths or tables: a workspace
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
  status result = status::ok;
  (void)((result = ops<Backend>::compact(on, sources, kept, how), result == status::ok) && ...);
  return result;
}

/// Whether `source` holds the same sequences as `seen`.
template <kv_source Source, observation Seen>
[[nodiscard]] constexpr bool same_tokens(const Source& source, const Seen& seen) noexcept {
  if (source.invalid() != nullptr || source.sequences() != seen.sequences() ||
      source.kv_heads() != seen.kv_heads()) {
    return false;
  }
  if constexpr (std::same_as<typename Seen::memory, host_memory>) {
    for (index_t s = 0; s < seen.sequences(); ++s) {
      if (source.tokens(s) != seen.tokens(s)) return false;
    }
  }
  return true;
}

/// Whether each range of `kept` is one of `source`'s sequences.
template <kv_source Source>
[[nodiscard]] constexpr bool fits(const view<const kept_range, 2, typename Source::memory>& kept,
                                  const Source& source) noexcept {
  if (source.invalid() != nullptr || kept.malformed() || kept.extent(0) != source.sequences() ||
      (kept.extent(1) != 1 && kept.extent(1) != source.kv_heads())) {
    return false;
  }
  if constexpr (std::same_as<typename Source::memory, host_memory>) {
    for (index_t s = 0; s < kept.extent(0); ++s) {
      for (index_t g = 0; g < kept.extent(1); ++g) {
        const kept_range& k = kept(s, g);
        if (k.sinks < 0 || k.sinks > k.cut || k.cut > k.tokens || k.tokens != source.tokens(s)) {
          return false;
        }
      }
    }
  }
  return true;
}

/// Whether the positions are ascending ones of `source`'s sequences.
template <kv_source Source>
[[nodiscard]] constexpr bool fits(const kept_positions<typename Source::memory>& kept,
                                  const Source& source) noexcept {
  if (source.invalid() != nullptr ||
      misshapen(kept, source.sequences(), source.kv_heads(), 0) != nullptr) {
    return false;
  }
  if constexpr (std::same_as<typename Source::memory, host_memory>) {
    for (index_t s = 0; s < source.sequences(); ++s) {
      for (index_t h = 0; h < source.kv_heads(); ++h) {
        const kept_count& k = kept.counts(s, h);
        if (k.count < 0 || k.count > kept.positions.extent(2) || k.tokens != source.tokens(s)) {
          return false;
        }
        index_t last = -1;
        for (index_t i = 0; i < k.count; ++i) {
          const index_t position = kept.positions(s, h, i);
          if (position <= last || position >= k.tokens) return false;
          last = position;
        }
      }
    }
  }
  return true;
}

}  // namespace detail

/// Makes what is kept contiguous in each source (keys, values, scales ...), in place:
/// afterwards the kept tokens of a (sequence, kv_head) are its slots
/// [first_slot(kept, how), first_slot(kept, how) + kept.length()), sinks first.
/// kept: [sequence, 1 or kv_head], as `select` wrote it; where sinks == cut nothing is touched, so
/// this is how to leave a sequence out: one whose page_plan moves no sinks because others share its
/// pages, say. Neither allocates nor synchronises.
template <backend Backend, kv_source... Sources>
  requires(sizeof...(Sources) > 0 &&
           (std::same_as<typename Sources::memory, typename ops<Backend>::memory> && ...))
[[nodiscard]] status compact(const Backend& on,
                             view<const kept_range, 2, typename ops<Backend>::memory> kept,
                             compaction how, const Sources&... sources) noexcept {
  if (!(detail::fits(kept, sources) && ...)) return status::invalid_argument;
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
  if (!(detail::fits(kept, sources) && ...)) return status::invalid_argument;
  return detail::compact_all(on, kept, how, sources...);
}

/// select, then compact of the observed keys and of `values` (none, or any number of sources that
/// hold the same sequences). Ranks that share heads call the two themselves, to pass a reduction.
template <class Policy, backend Backend, observation Seen, kv_source... Values>
  requires policy_for<Policy, Backend, Seen> && requires(const Seen& seen) {
    requires kv_source<std::remove_cvref_t<decltype(seen.keys)>>;
  }
[[nodiscard]] status prune(const Policy& rule, const Backend& on, const Seen& seen,
                           const decision_of<Policy, typename Seen::memory>& kept,
                           workspace<typename Seen::memory> scratch, compaction how,
                           const Values&... values) noexcept {
  if (!(detail::same_tokens(values, seen) && ...)) return status::invalid_argument;
  const status selected = select(rule, on, seen, kept, scratch);
  if (selected != status::ok) return selected;
  return detail::compact_all(on, detail::to_read(kept), how, seen.keys, values...);
}

}  // namespace refreekv::inline v0
