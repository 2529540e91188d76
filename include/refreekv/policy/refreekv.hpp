// SPDX-License-Identifier: Apache-2.0
// ReFreeKV (arXiv 2502.16886): no budget; a layer keeps what its norm needs.
//
// Tokens are ranked by position: sinks, then newest to oldest. The energy of a token is the square
// of its attention from the last prompt token; a wider window averages over its rows. The norm of a
// cut c is the mean over query heads of the root of the energy of tokens [c, n). The cut is the
// largest c at which the norm has lost at most `threshold` of itself. norm_scan.hpp explains the
// algorithm.
#pragma once

#include "refreekv/policy/policy.hpp"

namespace refreekv::inline v0::policy {

/// Requires the layer's number (layer_info::index), unless full_layers is 0.
struct refreekv {
  template <class Memory>
  using decision = kept_ranges<Memory>;
  static constexpr bool takes_shards = true;

  double threshold = 0.01;  ///< largest share of the norm that may be lost, in [0, 1]
  count_t sinks = 4;        ///< first tokens that always stay, outside the norm by default
  count_t window = 1;       ///< last queries that are read, at least 1; if fewer, all
  row_average average = row_average::mean;
  norm_scope norm = norm_scope::candidates;
  cut_scope scope = cut_scope::layer;
  count_t full_layers = 2;  ///< first layers that are never pruned (the paper's appendix B)

  static constexpr const char* name = "refreekv";
  static constexpr std::tuple options{
      option{"threshold", &refreekv::threshold, "share of the norm that may be lost", any_share},
      option{"sinks", &refreekv::sinks, "first tokens that always stay"},
      option{"window", &refreekv::window, "last queries to look at", at_least_one},
      option{"average", &refreekv::average, "how the rows of the window become one energy"},
      option{"norm", &refreekv::norm, "what the norm is taken over"},
      option{"scope", &refreekv::scope, "which query heads share a cut"},
      option{"full_layers", &refreekv::full_layers, "first layers that are never pruned"}};

  /// Null, or the error that the layer's number is not set although full_layers is not 0, or that a
  /// part of a shard splits a chunk.
  template <attention_layer Layer>
  [[nodiscard]] constexpr const char* invalid(const Layer& layer) const noexcept {
    if constexpr (sharded_layer<Layer>) {
      if (const char* why = layer.keys.splits_chunk(sinks)) return why;
    }
    return detail::needs_layer(layer, full_layers);
  }

  template <attention_layer Layer>
  [[nodiscard]] constexpr index_t groups(const Layer& layer) const noexcept {
    return scan(layer).groups(layer.kv_heads());
  }

  template <class Backend>
  struct buffers {
    norm_scan_buffers scan;
    typename ops<Backend>::scan_scratch scratch;
  };

  template <backend Backend, attention_layer Layer>
  [[nodiscard]] buffers<Backend> carve(arena& from, const Backend& exec,
                                       const Layer& layer) const noexcept {
    return {norm_scan_buffers::carve(from, scan(layer), layer),
            ops<Backend>::carve_scan_scratch(from, exec, scan(layer), detail::plain(layer))};
  }

  /// Writes the kept ranges [sequence, group].
  ///
  /// Tensor parallel (heads split): `ranks` is a head_reduction, and all ranks find one common cut.
  /// It sums the norms [sequence, group, chunk], then the norms [sequence, group, chunk_tokens].
  /// The sums differ from those of a single rank in the order of their additions. So a loss differs
  /// by at most 1e-16 for each query head, and the float in the result in its last digit. The cut
  /// differs only if a loss is that near to the threshold. dropped_mass covers a rank's own heads.
  /// With cut_scope::kv_head, ranks with different KV heads share no cut: they decide without
  /// a head_reduction.
  ///
  /// Context parallel (tokens split): `ranks` is a token_exchange. It gathers on all ranks the
  /// chunk_statistics [sequence, q_head, window, chunk], twice for a mean over several rows. Then
  /// it gathers the norms [sequence, group, chunk_tokens], and the masses of that shape. The
  /// results of all ranks equal those of a single rank, bit for bit.
  template <backend Backend, attention_layer Layer, class Ranks>
  status select(const Backend& exec, const Layer& layer, const buffers<Backend>& work,
                const decision<typename Layer::memory>& kept, const Ranks& ranks) const noexcept {
    using run = ops<Backend>;
    if (detail::stays_whole(layer, full_layers))
      return detail::assign(exec, layer, kept, keep_all{sinks});
    const norm_scan of = scan(layer);
    const auto& plain = detail::plain(layer);
    const norm_scan_buffers& scanned = work.scan;
    const index_t cuts = layer.sequences() * groups(layer);
    const index_t rows = layer.sequences() * layer.q_heads() * of.window;
    status s = run::read_chunks(exec, of, plain, scanned, work.scratch);
    if (s == status::ok) s = share<Layer>(ranks, scanned.statistics, rows * scanned.chunks);
    if (s == status::ok) s = run::normalise_rows(exec, of, plain, scanned, work.scratch);
    if (s == status::ok && !of.one_pass()) {
      s = share<Layer>(ranks, scanned.statistics, rows * scanned.chunks);
    }
    if (s == status::ok) s = run::norm_curve(exec, of, plain, scanned, work.scratch);
    if (s == status::ok) s = sum(ranks, scanned.norms, cuts * scanned.chunks);
    if (s == status::ok) s = run::crossing_curve(exec, of, plain, scanned, work.scratch);
    if (s == status::ok) s = share<Layer>(ranks, scanned.chunk_norms, cuts * chunk_tokens);
    if (s == status::ok) s = share<Layer>(ranks, scanned.chunk_masses, cuts * chunk_tokens);
    if (s == status::ok) s = sum(ranks, scanned.chunk_norms, cuts * chunk_tokens);
    if (s == status::ok) s = run::find_cuts(exec, of, plain, scanned, kept);
    return s;
  }

  struct keep_all {  // public, because device code requires it
    index_t sinks;
    REFREEKV_HOST_DEVICE constexpr kept_range operator()(index_t tokens) const noexcept {
      return position_ranking(tokens, sinks).all();
    }
  };

 private:
  /// Sums [count] over the ranks with other heads, in place. Does nothing without a head_reduction.
  template <class Ranks>
  static status sum(const Ranks& ranks, double* sums, index_t count) noexcept {
    if constexpr (head_reduction<Ranks>) {
      return ranks(sums, count);
    } else {
      return status::ok;
    }
  }
  /// Gathers the results [count] of the ranks with other tokens, in place. Does nothing unless the
  /// layer is sharded.
  template <class Layer, class Ranks, class T>
  static status share(const Ranks& ranks, T* values, index_t count) noexcept {
    if constexpr (sharded_layer<Layer>) {
      constexpr index_t words = sizeof(T) / sizeof(std::uint32_t);
      return ranks(reinterpret_cast<std::uint32_t*>(values), count * words);
    } else {
      return status::ok;
    }
  }

  template <attention_layer Layer>
  [[nodiscard]] constexpr norm_scan scan(const Layer& layer) const noexcept {
    return {threshold, sinks, detail::most_rows(layer, window), average, norm, scope};
  }
};

}  // namespace refreekv::inline v0::policy
