// SPDX-License-Identifier: Apache-2.0
// The library's verbs: select, compact, and prune, which is both.
#pragma once

#include "refreekv/policy.hpp"

namespace refreekv::inline v0 {

/// Null, or why `select` would return invalid_argument, in words that name the culprit.
/// kept: [sequence, group]. O(tables). Device tables are not looked at.
template <class Policy, observation Seen>
[[nodiscard]] constexpr const char* why_invalid(
    const Policy& rule, const Seen& seen,
    const view<kept_range, 2, typename Seen::memory>& kept) noexcept {
  if (const char* why = rule.invalid()) return why;
  if (const char* why = seen.invalid()) return why;
  if (const char* why = rule.invalid(seen)) return why;
  if (kept.malformed() || kept.extent(0) != seen.sequences() ||
      kept.extent(1) != rule.groups(seen)) {
    return "kept must be [sequence, group]; groups are the policy's: 1 or kv_heads";
  }
  return nullptr;
}

/// Bytes that `select` needs. Depends on extents and options, not on lengths or tables: a workspace
/// for the largest batch and capacity serves all. 0 for arguments that `select` refuses. O(tables).
template <class Policy, backend Backend, observation Seen>
  requires policy_for<Policy, Backend, Seen>
[[nodiscard]] std::size_t workspace_size(const Policy& rule, const Backend& on,
                                         const Seen& seen) noexcept {
  if (rule.invalid() != nullptr || seen.invalid() != nullptr) return 0;
  arena count;
  (void)rule.take(count, on, seen);
  return count.bytes();
}

/// Decides what stays of each sequence of one layer; nothing is moved yet.
/// kept: [sequence, group], with groups 1 or kv_heads as the policy says. Sequences do not
/// influence each other. `reduce` sums norms over tensor-parallel ranks. Neither allocates nor
/// synchronises; of the keys, each is read once (see ops).
template <class Policy, backend Backend, observation Seen, reduction Reduce = no_reduction>
  requires policy_for<Policy, Backend, Seen> &&
           std::same_as<typename Seen::memory, typename ops<Backend>::memory>
[[nodiscard]] status select(const Policy& rule, const Backend& on, const Seen& seen,
                            view<kept_range, 2, typename Seen::memory> kept,
                            workspace<typename Seen::memory> scratch,
                            const Reduce& reduce = {}) noexcept {
  if (why_invalid(rule, seen, kept) != nullptr) return status::invalid_argument;
  const std::size_t needed = workspace_size(rule, on, seen);
  if (scratch.bytes < needed) return status::small_workspace;
  if (needed != 0 && scratch.data == nullptr) return status::small_workspace;
  arena carve(scratch.data);
  return rule.select(on, seen, rule.take(carve, on, seen), kept, reduce);
}

/// Makes what is kept contiguous in each source (keys, values, scales ...), in place:
/// afterwards the kept tokens of a (sequence, kv_head) are its slots
/// [first_slot(kept, how), first_slot(kept, how) + kept.length()), sinks first.
/// kept: [sequence, 1 or kv_head], as `select` wrote it. Neither allocates nor synchronises.
/// Two sequences that share pages must not both be compacted: see plan_pages.
template <backend Backend, kv_source... Sources>
  requires(sizeof...(Sources) > 0 &&
           (std::same_as<typename Sources::memory, typename ops<Backend>::memory> && ...))
[[nodiscard]] status compact(const Backend& on,
                             view<const kept_range, 2, typename ops<Backend>::memory> kept,
                             compaction how, const Sources&... sources) noexcept {
  const auto invalid = [&](const auto& source) {
    if (source.invalid() != nullptr || kept.malformed() || kept.extent(0) != source.sequences() ||
        (kept.extent(1) != 1 && kept.extent(1) != source.kv_heads())) {
      return true;
    }
    if constexpr (std::same_as<typename ops<Backend>::memory, host_memory>) {
      for (index_t s = 0; s < kept.extent(0); ++s) {
        for (index_t g = 0; g < kept.extent(1); ++g) {
          const kept_range& k = kept(s, g);
          if (k.sinks < 0 || k.sinks > k.cut || k.cut > k.tokens || k.tokens != source.tokens(s)) {
            return true;
          }
        }
      }
    }
    return false;
  };
  if ((invalid(sources) || ...)) return status::invalid_argument;
  status result = status::ok;
  (void)((result = ops<Backend>::compact(on, sources, kept, how), result == status::ok) && ...);
  return result;
}

/// select, then compact of the observed keys and of `values` (none, or any number of sources).
template <class Policy, backend Backend, observation Seen, kv_source... Values>
[[nodiscard]] status prune(const Policy& rule, const Backend& on, const Seen& seen,
                           view<kept_range, 2, typename Seen::memory> kept,
                           workspace<typename Seen::memory> scratch, compaction how,
                           const Values&... values) noexcept {
  const status selected = select(rule, on, seen, kept, scratch);
  if (selected != status::ok) return selected;
  return compact(on, view<const kept_range, 2, typename Seen::memory>(kept), how, seen.keys,
                 values...);
}

}  // namespace refreekv::inline v0
