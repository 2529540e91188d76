// SPDX-License-Identifier: Apache-2.0
// Converts decisions about whole sequences to ranges of one rank's tokens (context parallel).
#pragma once

#include "refreekv/backend/backend.hpp"
#include "refreekv/cache/shard.hpp"

namespace refreekv::inline v0 {

namespace detail {

template <class Source>
struct assign_own {
  shard<Source> keys;
  view<const kept_range, 2, typename Source::memory> all;
  kept_ranges<typename Source::memory> own;

  REFREEKV_HOST_DEVICE constexpr void operator()(index_t s) const noexcept {
    for (index_t g = 0; g < all.extent(1); ++g) own(s, g) = keys.local_range(s, all(s, g));
  }
};

}  // namespace detail

/// Null, or the reason in words why `local_ranges` would return invalid_argument. O(1).
template <class Source>
[[nodiscard]] constexpr const char* why_invalid(
    const shard<Source>& keys, view<const kept_range, 2, typename Source::memory> all,
    const kept_ranges<typename Source::memory>& own) noexcept {
  if (all.malformed() || all.extent(0) != keys.shape().sequences) {
    return "decisions about whole sequences must be [sequence, group], of the shard's sequences";
  }
  if (own.malformed() || own.extent(0) != all.extent(0) || own.extent(1) != all.extent(1)) {
    return "decisions about whole sequences and own ones differ in shape";
  }
  return nullptr;
}

/// Writes this rank's part of decisions about whole sequences: own [sequence, group], the ranges by
/// which to compact keys.source() and its values. `own` may be `all`. Returns invalid_argument if
/// the two differ in shape or are not of the shard's sequences. Neither allocates nor synchronises.
/// O(ranges).
template <backend Backend, class Source>
  requires std::same_as<typename Source::memory, typename ops<Backend>::memory>
[[nodiscard]] status local_ranges(const Backend& exec, const shard<Source>& keys,
                                  view<const kept_range, 2, typename ops<Backend>::memory> all,
                                  const kept_ranges<typename ops<Backend>::memory>& own) noexcept {
  if (why_invalid(keys, all, own) != nullptr) return status::invalid_argument;
  return ops<Backend>::for_each_sequence(exec, keys.shape().sequences,
                                         detail::assign_own<Source>{keys, all, own});
}

}  // namespace refreekv::inline v0
