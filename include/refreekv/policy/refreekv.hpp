// SPDX-License-Identifier: Apache-2.0
// ReFreeKV (arXiv 2502.16886): no budget; a layer keeps what its norm needs.
//
// Tokens are ranked by position: sinks, then newest to oldest. The energy of a token is the square
// of its attention from the last prompt token, averaged over the window if that is wider. The norm
// of a cut c is the mean over query heads of the root of the energy in [c, n). The cut is the
// largest c at which the norm has lost at most `threshold` of itself.
#pragma once

#include "refreekv/policy.hpp"

namespace refreekv::inline v0::policy {

struct refreekv {
  template <class Memory>
  using decision = kept_ranges<Memory>;

  double threshold = 0.01;  ///< the norm may lose this share of itself, in [0, 1]
  count_t sinks = 4;        ///< first tokens that always stay, outside the norm by default
  count_t window = 1;       ///< last queries that are looked at, at least 1; all there are if fewer
  row_average average = row_average::mean;
  norm_scope norm = norm_scope::candidates;
  cut_scope scope = cut_scope::layer;
  count_t full_layers = 2;  ///< first layers that are never pruned (the paper's appendix B)

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (!(threshold >= 0 && threshold <= 1)) return "threshold must be in [0, 1]";
    if (sinks > max_count) return "sinks must be >= 0";
    if (window < 1 || window > max_count) return "window must be >= 1";
    if (full_layers > max_count) return "full_layers must be >= 0";
    return nullptr;
  }

  /// The observation's window must hold as many rows as the rule's, or the whole sequence.
  template <attention_observation Seen>
  [[nodiscard]] constexpr const char* invalid(const Seen& seen) const noexcept {
    return detail::too_few_rows(seen, window);
  }

  template <attention_observation Seen>
  [[nodiscard]] constexpr index_t groups(const Seen& seen) const noexcept {
    return scan(seen).groups(seen.kv_heads());
  }

  template <class Backend>
  struct buffers {
    norm_scan_buffers scan;
    typename ops<Backend>::scan_scratch scratch;
  };

  template <backend Backend, attention_observation Seen>
  [[nodiscard]] buffers<Backend> take(arena& from, const Backend& on,
                                      const Seen& seen) const noexcept {
    return {norm_scan_buffers::take(from, scan(seen), seen),
            ops<Backend>::take_scan_scratch(from, on, scan(seen), observed(seen))};
  }

  /// `reduce` makes one cut of heads that live on several ranks: it sums [sequence, group, chunk]
  /// norms, then [sequence, group, chunk_tokens]. Ranks with different KV heads share no cut of
  /// cut_scope::kv_head: they decide without it.
  template <backend Backend, attention_observation Seen, reduction Reduce>
  status select(const Backend& on, const Seen& seen, const buffers<Backend>& work,
                const decision<typename Seen::memory>& kept, const Reduce& reduce) const noexcept {
    using run = ops<Backend>;
    if (seen.info.layer < full_layers) return detail::assign(on, seen, kept, keep_all{sinks});
    const norm_scan rule = scan(seen);
    const index_t cuts = seen.sequences() * groups(seen);
    status s = run::norm_curve(on, rule, observed(seen), work.scan, work.scratch);
    if (s == status::ok) s = reduce(work.scan.norms, cuts * work.scan.chunks);
    if (s == status::ok) s = run::crossing_curve(on, rule, observed(seen), work.scan, work.scratch);
    if (s == status::ok) s = reduce(work.scan.chunk_norms, cuts * chunk_tokens);
    if (s == status::ok) s = run::find_cuts(on, rule, observed(seen), work.scan, kept);
    return s;
  }

  struct keep_all {  // public, as device code wants it
    index_t sinks;
    REFREEKV_HOST_DEVICE constexpr kept_range operator()(index_t tokens) const noexcept {
      return position_ranking(tokens, sinks).all();
    }
  };

 private:
  template <attention_observation Seen>
  [[nodiscard]] constexpr norm_scan scan(const Seen& seen) const noexcept {
    return {threshold, sinks, detail::rows_of(seen, window), average, norm, scope};
  }
};

}  // namespace refreekv::inline v0::policy
