// SPDX-License-Identifier: Apache-2.0
// Decides which tokens of each sequence of a layer stay.
#pragma once

#include "refreekv/decision/checks.hpp"
#include "refreekv/policy/policy.hpp"

namespace refreekv::inline v0 {

/// Null, or the reason in words why `select` would return invalid_argument; it names the argument
/// that is wrong. O(tables). Device tables are not read.
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

/// The bytes of workspace that `select` requires. They depend on extents and options, and on
/// whether rows have ends, not on lengths or tables. So a workspace for the largest batch and
/// capacity serves all. Returns 0 if `policy` or `layer` is invalid(), and the largest possible
/// size if no memory could hold it. O(tables).
template <class Policy, backend Backend, model_layer Layer>
  requires policy_for<Policy, Backend, Layer>
[[nodiscard]] std::size_t workspace_size(const Policy& policy, const Backend& exec,
                                         const Layer& layer) noexcept {
  if (why_invalid(policy) != nullptr || layer.invalid() != nullptr) return 0;
  arena count;
  (void)detail::method_of(policy, layer).carve(count, exec, layer);
  return count.bytes();
}

/// Decides which tokens of each sequence of one layer stay. Moves nothing yet.
/// kept: kept_ranges [sequence, group], with 1 or kv_heads groups as the policy says, or
/// kept_positions; the policy's decision type says which. Sequences do not influence each other.
/// `ranks` sums over tensor parallel ranks the values that they decide on together, and gathers the
/// results of context parallel ranks. A shard's decision covers its whole sequence: see
/// local_ranges.
/// Returns invalid_argument if why_invalid is not null, and small_workspace if scratch has fewer
/// than workspace_size bytes. Neither allocates nor synchronises.
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
  arena memory(scratch.data);
  return method.select(exec, layer, method.carve(memory, exec, layer), kept, ranks);
}

}  // namespace refreekv::inline v0
