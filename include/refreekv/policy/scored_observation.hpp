// SPDX-License-Identifier: Apache-2.0
// An observation with scores that go on from one step to the next.
#pragma once

#include "refreekv/attention/observation.hpp"
#include "refreekv/backend/token_scores.hpp"

namespace refreekv::inline v0 {

namespace detail {

template <class O>
[[nodiscard]] constexpr const char* invalid_scores(const scores_view<typename O::memory>& scores,
                                                   const O& seen) noexcept {
  if (scores.malformed() || scores.extent(0) != seen.sequences() ||
      scores.extent(1) != seen.kv_heads() || scores.extent(2) < seen.capacity()) {
    return "scores must be [sequence, kv_head, capacity]";
  }
  return nullptr;
}

}  // namespace detail

/// An observation and the scores that its tokens have earned so far, which are the caller's.
template <observation Seen>
struct scored_observation : Seen {
  using observed = Seen;

  /// [sequence, kv_head, capacity]
  scores_view<typename Seen::memory> scores;

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (const char* why = Seen::invalid()) return why;
    return detail::invalid_scores(scores, *this);
  }
};

template <observation Seen>
[[nodiscard]] constexpr auto with_scores(
    const Seen& seen, const scores_view<typename Seen::memory>& scores) noexcept {
  return scored_observation<Seen>{{seen}, scores};
}

}  // namespace refreekv::inline v0
