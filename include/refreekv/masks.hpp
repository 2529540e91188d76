// SPDX-License-Identifier: Apache-2.0
// Writes a decision about a whole batch as masks, in the decision's memory: on the host or a
// device.
#pragma once

#include "refreekv/backend/backend.hpp"
#include "refreekv/decision/checks.hpp"

namespace refreekv::inline v0 {

/// Null, or the reason in words why `write_masks` would return invalid_argument. O(tables).
template <class T, class Memory>
[[nodiscard]] constexpr const char* why_invalid(
    std::type_identity_t<view<const kept_range, 2, Memory>> kept, view<T, 3, Memory> mask,
    std::type_identity_t<T>, std::type_identity_t<T>) noexcept {
  if (!detail::has_rows(mask, kept.extent(0))) {
    return "mask must be [sequence, group, token] with contiguous rows";
  }
  return detail::unfit_ranges(kept, mask.extent(0), mask.extent(1), mask.extent(2));
}
template <class T, class Memory>
[[nodiscard]] constexpr const char* why_invalid(
    const std::type_identity_t<kept_positions<Memory>>& kept, view<T, 3, Memory> mask,
    std::type_identity_t<T>, std::type_identity_t<T>) noexcept {
  if (!detail::has_rows(mask, kept.counts.extent(0))) {
    return "mask must be [sequence, kv_head, token] with contiguous rows";
  }
  return detail::unfit_positions(kept, mask.extent(0), mask.extent(1), mask.extent(2));
}

/// Writes `keep` for tokens that stay, and `drop` for dropped tokens and for entries past a
/// sequence's last token. Masks are bytes (1, 0), booleans, or additive masks of any float type (0,
/// -infinity). mask: [sequence, group, token], with the groups of `kept`. Requires contiguous rows,
/// at least as long as the longest sequence. A device does not check their length, but writes
/// nothing past their end. Neither allocates nor synchronises. O(entries of the mask).
template <backend Backend, class T>
  requires(!std::is_const_v<T>)
[[nodiscard]] status write_masks(const Backend& exec,
                                 view<const kept_range, 2, typename ops<Backend>::memory> kept,
                                 view<T, 3, typename ops<Backend>::memory> mask,
                                 std::type_identity_t<T> keep,
                                 std::type_identity_t<T> drop) noexcept {
  if (why_invalid(kept, mask, keep, drop) != nullptr) return status::invalid_argument;
  return ops<Backend>::write_masks(exec, kept, mask, keep, drop);
}

/// As `write_masks` of ranges, but for positions that need not be a range; mask: [sequence,
/// kv_head, token].
template <backend Backend, class T>
  requires(!std::is_const_v<T>)
[[nodiscard]] status write_masks(const Backend& exec,
                                 const kept_positions<typename ops<Backend>::memory>& kept,
                                 view<T, 3, typename ops<Backend>::memory> mask,
                                 std::type_identity_t<T> keep,
                                 std::type_identity_t<T> drop) noexcept {
  if (why_invalid(kept, mask, keep, drop) != nullptr) return status::invalid_argument;
  return ops<Backend>::write_masks(exec, kept, mask, keep, drop);
}

}  // namespace refreekv::inline v0
