// SPDX-License-Identifier: Apache-2.0
// ReFreeKV's ablation (arXiv 2502.16886, table 5): its stop rule on tokens ranked by attention.
//
// Each KV head ranks its tokens by the attention that they receive: from the last queries in the
// released code, from all queries in the paper. Tokens are dropped from the least to the most
// important one, as long as the norm of the last row has lost at most `threshold` of itself. All
// heads drop the same number of tokens. The recent tokens stay and are outside the norm.
#pragma once

#include "refreekv/policy/policy.hpp"

namespace refreekv::inline v0::policy {

/// Requires the layer's number (layer_info::index), unless full_layers is 0.
struct attention_ranked {
  template <class Memory>
  using decision = kept_positions<Memory>;

  double threshold = 0.01;  ///< largest share of the norm that may be lost, in [0, 1]
  /// Last queries that rank tokens, at least 1. If there are fewer, all of them; all_queries is the
  /// paper's choice.
  count_t window = 8;
  count_t recent = 8;       ///< last tokens, which always stay
  count_t full_layers = 2;  ///< first layers that are never pruned

  static constexpr const char* name = "attention_ranked";
  static constexpr std::tuple options{
      option{"threshold", &attention_ranked::threshold, "share of the norm that may be lost",
             any_share},
      option{"window", &attention_ranked::window, "last queries that rank tokens", at_least_one},
      option{"recent", &attention_ranked::recent, "last tokens that always stay"},
      option{"full_layers", &attention_ranked::full_layers, "first layers that are never pruned"}};

  /// Null, or the error that the layer's number is not set although full_layers is not 0. O(1).
  template <attention_layer Layer>
  [[nodiscard]] constexpr const char* invalid(const Layer& layer) const noexcept {
    return detail::needs_layer(layer, full_layers);
  }
  template <class Backend>
  struct buffers {
    float* scores;      ///< [sequence, kv_head, capacity]
    float* weights;     ///< [sequence, q_head, capacity]: the last row
    position_t* order;  ///< [sequence, kv_head, capacity]
    double* norms;      ///< [sequence, capacity]
    typename ops<Backend>::attention_scratch attention;
    typename ops<Backend>::ranking_scratch ranking;
  };

  template <backend Backend, attention_layer Layer>
  [[nodiscard]] buffers<Backend> carve(arena& from, const Backend& exec,
                                       const Layer& layer) const noexcept {
    const index_t sequences = layer.sequences(), capacity = layer.capacity();
    return {from.array<float>(sequences, layer.kv_heads(), capacity),
            from.array<float>(sequences, layer.q_heads(), capacity),
            from.array<position_t>(sequences, layer.kv_heads(), capacity),
            from.array<double>(sequences, capacity),
            ops<Backend>::carve_attention_scratch(from, exec, detail::most_rows(layer, window),
                                                  detail::plain(layer)),
            ops<Backend>::carve_ranking_scratch(from, exec, detail::plain(layer))};
  }

  /// Writes the kept tokens. `reduce` sums norms [sequence, capacity] over the ranks, so that the
  /// heads of all ranks drop the same number of tokens.
  template <backend Backend, attention_layer Layer, head_reduction Reduce>
  status select(const Backend& exec, const Layer& layer, const buffers<Backend>& work,
                const decision<typename Layer::memory>& kept, const Reduce& reduce) const noexcept {
    using run = ops<Backend>;
    using scores_type = scores_view<typename Layer::memory>;
    const auto& plain = detail::plain(layer);
    const index_t sequences = layer.sequences(), capacity = layer.capacity();
    const scores_type scores(work.scores, {sequences, layer.kv_heads(), capacity});
    const scores_type weights(work.weights, {sequences, layer.q_heads(), capacity});
    if (detail::stays_whole(layer, full_layers)) return run::keep_all(exec, plain, kept);
    const index_t rows = detail::most_rows(layer, window);
    status s =
        run::attention_sums(exec, score_rows{rows}, plain, scores, kept.counts, work.attention);
    if (s == status::ok) {
      s = run::attention_sums(exec, score_rows{detail::most_rows(layer, 1)}, plain, weights,
                              kept.counts, work.attention);
    }
    if (s == status::ok) {
      s = run::rank_tokens(exec, recent, plain, scores, weights, work.order, work.norms,
                           work.ranking);
    }
    if (s == status::ok) s = reduce(work.norms, sequences * capacity);
    if (s == status::ok) {
      s = run::stop_ranked(exec, threshold, recent, plain, work.norms, work.order, kept,
                           work.ranking);
    }
    return s;
  }
};

}  // namespace refreekv::inline v0::policy
