// SPDX-License-Identifier: Apache-2.0
// ReFreeKV (arXiv 2502.16886): no budget; a layer keeps what its norm needs.
//
// Tokens are ranked by position: sinks, then newest to oldest. The energy of a token is the square
// of its attention from the last prompt token, averaged over the window if that is wider. The norm
// of a cut c is the mean over query heads of the root of the energy in [c, n). The cut is the
// largest c at which the norm has lost at most `threshold` of itself.
#pragma once

#include "refreekv/policy/policy.hpp"

namespace refreekv::inline v0::policy {

struct refreekv {
  template <class Memory>
  using decision = kept_ranges<Memory>;
  static constexpr bool takes_shards = true;

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

  /// The observation says which layer it is of, unless full_layers is 0; the parts of a shard must
  /// be whole chunks.
  template <attention_observation Seen>
  [[nodiscard]] constexpr const char* invalid(const Seen& seen) const noexcept {
    if constexpr (sharded<Seen>) {
      if (const char* why = seen.keys.splits_chunk(sinks)) return why;
    }
    return detail::needs_layer(seen, full_layers);
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

  /// Heads on several ranks: `join`, a reduction, makes one cut of them. It sums norms [sequence,
  /// group, chunk], then [sequence, group, chunk_tokens]. The sums are a single rank's in another
  /// order of additions: losses differ by 1e-16 for each query head at most, so the float in the
  /// result by its last digit, and the cut only where a loss is that near to the threshold.
  /// dropped_mass is of a rank's own heads. Ranks with different KV heads share no cut of
  /// cut_scope::kv_head: they decide without it.
  ///
  /// Tokens on several ranks: `join`, an exchange, gives all ranks the chunk_statistics [sequence,
  /// q_head, window, chunk] (twice for a mean over several rows), then [sequence, group,
  /// chunk_tokens] norms, and as many masses. All ranks find what a single one does, bit for bit.
  template <backend Backend, attention_observation Seen, class Join>
  status select(const Backend& on, const Seen& seen, const buffers<Backend>& work,
                const decision<typename Seen::memory>& kept, const Join& join) const noexcept {
    using run = ops<Backend>;
    if (detail::stays_whole(seen, full_layers))
      return detail::assign(on, seen, kept, keep_all{sinks});
    const norm_scan rule = scan(seen);
    const auto& what = observed(seen);
    const norm_scan_buffers& found = work.scan;
    const index_t cuts = seen.sequences() * groups(seen);
    const index_t rows = seen.sequences() * seen.q_heads() * rule.window;
    status s = run::read_chunks(on, rule, what, found, work.scratch);
    if (s == status::ok) s = share<Seen>(join, found.statistics, rows * found.chunks);
    if (s == status::ok) s = run::normalise_rows(on, rule, what, found, work.scratch);
    if (s == status::ok && !rule.one_pass()) {
      s = share<Seen>(join, found.statistics, rows * found.chunks);
    }
    if (s == status::ok) s = run::norm_curve(on, rule, what, found, work.scratch);
    if (s == status::ok) s = sum(join, found.norms, cuts * found.chunks);
    if (s == status::ok) s = run::crossing_curve(on, rule, what, found, work.scratch);
    if (s == status::ok) s = share<Seen>(join, found.chunk_norms, cuts * chunk_tokens);
    if (s == status::ok) s = share<Seen>(join, found.chunk_masses, cuts * chunk_tokens);
    if (s == status::ok) s = sum(join, found.chunk_norms, cuts * chunk_tokens);
    if (s == status::ok) s = run::find_cuts(on, rule, what, found, kept);
    return s;
  }

  struct keep_all {  // public, as device code wants it
    index_t sinks;
    REFREEKV_HOST_DEVICE constexpr kept_range operator()(index_t tokens) const noexcept {
      return position_ranking(tokens, sinks).all();
    }
  };

 private:
  /// Sums over the ranks with other heads.
  template <class Join>
  static status sum(const Join& join, double* sums, index_t count) noexcept {
    if constexpr (reduction<Join>) {
      return join(sums, count);
    } else {
      return status::ok;
    }
  }
  /// Gives what a rank has found to those with other tokens.
  template <class Seen, class Join, class T>
  static status share(const Join& join, T* found, index_t count) noexcept {
    if constexpr (sharded<Seen>) {
      constexpr index_t words = sizeof(T) / sizeof(std::uint32_t);
      return join(reinterpret_cast<std::uint32_t*>(found), count * words);
    } else {
      return status::ok;
    }
  }

  template <attention_observation Seen>
  [[nodiscard]] constexpr norm_scan scan(const Seen& seen) const noexcept {
    return {threshold, sinks, detail::most_rows(seen, window), average, norm, scope};
  }
};

}  // namespace refreekv::inline v0::policy
