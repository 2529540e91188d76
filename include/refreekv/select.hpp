// SPDX-License-Identifier: Apache-2.0
// Decides what stays of each sequence of a layer.
#pragma once

#include "refreekv/decision/checks.hpp"
#include "refreekv/policy/policy.hpp"

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

}  // namespace refreekv::inline v0
