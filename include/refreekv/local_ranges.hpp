// SPDX-License-Identifier: Apache-2.0
// What decisions about whole sequences leave on one of several ranks.
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

/// Null, or why `local_ranges` would return invalid_argument, in words. O(1)
template <class Source>
[[nodiscard]] constexpr const char* why_invalid(
    const shard<Source>& keys, view<const kept_range, 2, typename Source::memory> all,
    const kept_ranges<typename Source::memory>& own) noexcept {
  if (all.malformed() || all.extent(0) != keys.sequences()) {
    return "decisions about whole sequences must be [sequence, group], of the shard's sequences";
  }
  if (own.malformed() || own.extent(0) != all.extent(0) || own.extent(1) != all.extent(1)) {
    return "decisions about whole sequences and own ones differ in shape";
  }
  return nullptr;
}

/// What decisions about whole sequences leave on this rank: own [sequence, group], to compact
/// keys.source() and its values by. `own` may be `all`. invalid_argument where the two are not of
/// one shape or not of the shard's sequences. Neither allocates nor synchronises. O(ranges)
template <backend Backend, class Source>
  requires std::same_as<typename Source::memory, typename ops<Backend>::memory>
[[nodiscard]] status local_ranges(const Backend& exec, const shard<Source>& keys,
                                  view<const kept_range, 2, typename ops<Backend>::memory> all,
                                  const kept_ranges<typename ops<Backend>::memory>& own) noexcept {
  if (why_invalid(keys, all, own) != nullptr) return status::invalid_argument;
  return ops<Backend>::for_each_sequence(exec, keys.sequences(),
                                         detail::assign_own<Source>{keys, all, own});
}

}  // namespace refreekv::inline v0
