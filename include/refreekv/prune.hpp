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

/// select, then compact of the observed keys and of `values` (none, or any number of sources that
/// hold the same sequences, and other memory than the keys). Ranks that share heads call the two
/// themselves, to pass a reduction. Where a decision would write memory twice, a page that is in
/// two tables, say, the result is invalid_argument as ever, but `kept` has been written; the cache
/// has not. Then why_invalid(kept, how, keys, values...) says why.
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

/// The same of an observation that has its values, which are compacted with the keys, stand-ins
/// included; values that are a part of the keys move with them.
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
