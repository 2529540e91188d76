// SPDX-License-Identifier: Apache-2.0
// StreamingLLM (arXiv 2309.17453): a fixed budget of sinks and recent tokens, no attention needed.
//
// While sinks + recent tokens hold all there are and `room` more, all stay. Otherwise the sinks and
// the last recent - room stay. The same rule serves after a prefill, after every decoded token
// (room 0) and before a turn that is known to bring `room` tokens. Keys keep their rotation here;
// the paper rotates them by slot. A cache that is pruned again and again keeps its own count of
// positions.
#pragma once

#include "refreekv/policy.hpp"

namespace refreekv::inline v0::policy {

struct streaming_llm {
  count_t sinks = 4;
  count_t recent = 512;  ///< tokens besides the sinks
  count_t room = 0;      ///< tokens about to come that must fit; at most `recent` of it is made

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (sinks > max_count) return "sinks must be >= 0";
    if (recent > max_count) return "recent must be >= 0";
    if (room > max_count) return "room must be >= 0";
    return nullptr;
  }
  [[nodiscard]] constexpr const char* invalid(const observation auto&) const noexcept {
    return nullptr;
  }
  [[nodiscard]] constexpr index_t groups(const observation auto&) const noexcept { return 1; }

  struct buffers {};
  [[nodiscard]] buffers take(arena&, const backend auto&, const observation auto&) const noexcept {
    return {};
  }

  template <backend Backend, observation Seen>
  status select(const Backend& on, const Seen& seen, buffers,
                view<kept_range, 2, typename Seen::memory> kept,
                const reduction auto&) const noexcept {
    return ops<Backend>::assign(on, seen, kept, *this);
  }

  /// What stays of a sequence. O(1)
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr kept_range operator()(
      index_t tokens) const noexcept {
    const index_t budget = index_t{sinks} + recent;
    const position_ranking ranking(tokens, sinks);
    return tokens + room <= budget ? ranking.all() : ranking.best(budget - room);
  }
};

}  // namespace refreekv::inline v0::policy
