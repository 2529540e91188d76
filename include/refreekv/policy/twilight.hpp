// SPDX-License-Identifier: Apache-2.0
// Twilight (arXiv 2502.02770): for each query the fewest tokens that hold a share p of its
// attention.
//
// Made for decoding: every step attends to a fresh set and nothing leaves the cache. A selector
// (Quest) first narrows the tokens down to a few pages, if it is given bounds of them; attention is
// estimated from 4-bit keys, if those are observed in place of the keys; then each query head takes
// the fewest tokens that hold p of it, and a KV head the union over its query heads. Applied once
// to the last row of a prompt and compacted, it is what table 4 of arXiv 2502.16886 compares with.
#pragma once

#include "refreekv/policy/policy.hpp"

namespace refreekv::inline v0::policy {

/// What is read at a step is all of what is observed: the selector narrows what is kept.
struct twilight {
  template <class Memory>
  using decision = kept_positions<Memory>;

  double p = 0.95;          ///< share of the attention to keep, in [0, 1]
  count_t selected = 8192;  ///< tokens in the pages that the selector leaves each query head
  /// The set of the published kernel, whose bisection starts at the first token's attention: not
  /// minimal where that is not the largest, and everything where the selector dropped it.
  bool sink_start = false;
  count_t full_layers = 2;  ///< first layers that attend to all

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (!(p >= 0 && p <= 1)) return "p must be in [0, 1]";
    if (selected < 1 || selected > max_count) return "selected must be >= 1";
    if (full_layers > max_count) return "full_layers must be >= 0";
    return nullptr;
  }
  template <attention_observation Seen>
  [[nodiscard]] constexpr const char* invalid(const Seen& seen) const noexcept {
    return detail::needs_layer(seen, full_layers);
  }
  template <class Backend>
  struct buffers {
    float* weights;  ///< [sequence, q_head, capacity]
    typename ops<Backend>::attention_scratch attention;
    typename ops<Backend>::selection_scratch selection;
  };

  template <backend Backend, attention_observation Seen>
  [[nodiscard]] buffers<Backend> take(arena& from, const Backend& on,
                                      const Seen& seen) const noexcept {
    return {
        from.take<float>(seen.sequences(), seen.q_heads(), seen.capacity()),
        ops<Backend>::take_attention_scratch(from, on, detail::most_rows(seen, 1), observed(seen)),
        ops<Backend>::take_selection_scratch(from, on, seen)};
  }

  template <backend Backend, attention_observation Seen>
  status select(const Backend& on, const Seen& seen, const buffers<Backend>& work,
                const decision<typename Seen::memory>& kept, const reduction auto&) const noexcept {
    using run = ops<Backend>;
    const auto& what = observed(seen);
    const scores_view<typename Seen::memory> weights(
        work.weights, {seen.sequences(), seen.q_heads(), seen.capacity()});
    if (detail::stays_whole(seen, full_layers)) return run::keep_all(on, what, kept);
    status s = run::attention_sums(on, score_rows{detail::most_rows(seen, 1)}, what, weights,
                                   kept.counts, work.attention);
    if constexpr (requires { seen.pages; }) {
      if (s == status::ok)
        s = run::select_pages(on, seen.pages, selected, what, weights, work.selection);
    }
    if (s == status::ok) s = run::top_mass(on, p, sink_start, what, weights, kept, work.selection);
    return s;
  }
};

}  // namespace refreekv::inline v0::policy
