// SPDX-License-Identifier: Apache-2.0
// Decides what stays of each sequence of a layer.
#pragma once

#include "refreekv/decision/checks.hpp"
#include "refreekv/policy/policy.hpp"

namespace refreekv::inline v0 {

/// Null, or why `select` would return invalid_argument, in words that name the culprit.
/// O(tables). Device tables are not looked at.
template <class Policy, model_layer Layer>
[[nodiscard]] constexpr const char* why_invalid(
    const Policy& policy, const Layer& layer,
    const decision_of<Policy, typename Layer::memory>& kept) noexcept {
  if (const char* why = why_invalid(policy)) return why;
  if (const char* why = layer.invalid()) return why;
  if constexpr (requires { policy.invalid(layer); }) {
    if (const char* why = policy.invalid(layer)) return why;
  }
  if constexpr (requires { policy.invalid(layer, kept); }) {
    if (const char* why = policy.invalid(layer, kept)) return why;
  }
  return detail::misshapen(kept, layer.sequences(), groups_of(policy, layer), layer.capacity());
}

/// Bytes that `select` needs. Depends on extents and options, and on whether rows have ends, not on
/// lengths or tables: a workspace
/// for the largest batch and capacity serves all. 0 where `rule` or `layer` is invalid(), the
/// largest size there is where no memory could hold it. O(tables).
template <class Policy, backend Backend, model_layer Layer>
  requires policy_for<Policy, Backend, Layer>
[[nodiscard]] std::size_t workspace_size(const Policy& policy, const Backend& exec,
                                         const Layer& layer) noexcept {
  if (why_invalid(policy) != nullptr || layer.invalid() != nullptr) return 0;
  arena count;
  (void)detail::method_of(policy, layer).carve(count, exec, layer);
  return count.bytes();
}

/// Decides what stays of each sequence of one layer; nothing is moved yet.
/// kept: kept_ranges [sequence, group], with groups 1 or kv_heads as the policy says, or
/// kept_positions, whichever the policy's decision is. Sequences do not influence each other.
/// `join` sums over tensor-parallel ranks what they decide on together, and gives context-parallel
/// ones what each has found; a shard's decision is about all of its sequence, see local_ranges.
/// Neither allocates nor synchronises.
template <class Policy, backend Backend, model_layer Layer, collective<Layer> Ranks = single_rank>
  requires policy_for<Policy, Backend, Layer> &&
           std::same_as<typename Layer::memory, typename ops<Backend>::memory>
[[nodiscard]] status select(const Policy& policy, const Backend& exec, const Layer& layer,
                            const decision_of<Policy, typename Layer::memory>& kept,
                            workspace<typename Layer::memory> scratch,
                            const Ranks& ranks = {}) noexcept {
  if (why_invalid(policy, layer, kept) != nullptr) return status::invalid_argument;
  const auto& method = detail::method_of(policy, layer);
  arena count;
  (void)method.carve(count, exec, layer);
  if (scratch.bytes < count.bytes() || (count.bytes() != 0 && scratch.data == nullptr)) {
    return status::small_workspace;
  }
  arena carve(scratch.data);
  return method.select(exec, layer, method.carve(carve, exec, layer), kept, ranks);
}

}  // namespace refreekv::inline v0
