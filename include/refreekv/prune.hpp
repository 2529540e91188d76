// SPDX-License-Identifier: Apache-2.0
// Decides which tokens of each sequence of a layer stay, and makes them contiguous.
#pragma once

#include "refreekv/compact.hpp"
#include "refreekv/select.hpp"

namespace refreekv::inline v0 {

namespace detail {

/// A decision in the read-only form that `compact` requires.
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

/// Null, or the reason in words why `prune` with separate values would return invalid_argument
/// before it decides. Without values use why_invalid of `select`. O(tables).
template <class Policy, model_layer Layer, kv_source Value, kv_source... Values>
  requires requires(const Layer& layer) { layer.keys; }
[[nodiscard]] constexpr const char* why_invalid(
    const Policy& policy, const Layer& layer,
    const decision_of<Policy, typename Layer::memory>& kept, const Value& value,
    const Values&... values) noexcept {
  if (const char* why = why_invalid(policy, layer, kept)) return why;
  const char* why =
      detail::first_of({detail::differ(value, layer.keys), detail::differ(values, layer.keys)...});
  return why != nullptr ? why : detail::share_memory(layer.keys, value, values...);
}

/// Calls `select`, then compacts the layer's keys and `values`. These are none, or any number of
/// sources that hold the same sequences in other memory than the keys. Ranks that share heads call
/// `select` and `compact` themselves, to pass a collective. If the decision would write memory
/// twice, for example a page that is in two tables, returns invalid_argument; `kept` has been
/// written then, and the cache has not. Then why_invalid(kept, mode, keys, values...) returns the
/// reason. Neither allocates nor synchronises.
template <class Policy, backend Backend, model_layer Layer, kv_source... Values>
  requires policy_for<Policy, Backend, Layer> && requires(const Layer& layer) {
    requires kv_source<std::remove_cvref_t<decltype(layer.keys)>>;
  }
[[nodiscard]] status prune(const Policy& policy, const Backend& exec, const Layer& layer,
                           const decision_of<Policy, typename Layer::memory>& kept,
                           workspace<typename Layer::memory> scratch, compaction mode,
                           const Values&... values) noexcept {
  if (why_invalid(policy, layer, kept, values...) != nullptr) return status::invalid_argument;
  const status selected = select(policy, exec, layer, kept, scratch);
  if (selected != status::ok) return selected;
  if constexpr (requires { kept.stand_ins; }) {
    return compact(exec, kept, mode, layer.keys, values...);
  } else {
    const auto& decided = detail::to_read(kept);
    if (detail::aliased(decided, mode, layer.keys, values...) != nullptr) {
      return status::invalid_argument;
    }
    return detail::compact_all(exec, decided, mode, layer.keys, values...);
  }
}

/// As `prune` with separate values, but for a layer that has its values: they are compacted with
/// the keys, stand-ins included. Values that are a part of the keys move with them.
template <class Policy, backend Backend, model_layer Layer>
  requires policy_for<Policy, Backend, Layer> && requires(const Layer& layer) { layer.values; }
[[nodiscard]] status prune(const Policy& policy, const Backend& exec, const Layer& layer,
                           const decision_of<Policy, typename Layer::memory>& kept,
                           workspace<typename Layer::memory> scratch, compaction mode) noexcept {
  const status selected = select(policy, exec, layer, kept, scratch);
  if (selected != status::ok) return selected;
  return detail::share_memory(layer.keys, layer.values) == nullptr
             ? compact(exec, kept, mode, layer.keys, layer.values)
             : compact(exec, kept, mode, layer.keys);
}

}  // namespace refreekv::inline v0
