// SPDX-License-Identifier: Apache-2.0
// TOVA (arXiv 2401.06104): keeps the tokens that the last one attends to, the same for all heads.
//
// A token's score is the attention that it receives from the last row, averaged over all query
// heads of the layer. The last token and the tokens with the highest scores stay, up to the budget.
// While decoding, each step scores all tokens anew and drops the tokens above the budget.
#pragma once

#include "refreekv/policy/score_ranking.hpp"

namespace refreekv::inline v0::policy {

struct tova {
  template <class Memory>
  using decision = kept_positions<Memory>;

  /// Tokens, the last one included, which stays whatever the budget is.
  token_budget budget = 512;

  static constexpr const char* name = "tova";
  static constexpr std::tuple options{
      option{"budget", &tova::budget, "tokens that stay, the last one included"}};

  template <class Backend>
  struct buffers {
    float* scores;        ///< [sequence, kv_head, capacity]
    double* sums;         ///< [sequence, capacity]: scores summed over the KV heads
    token_quota* quotas;  ///< [sequence]
    typename ops<Backend>::attention_scratch attention;
    typename ops<Backend>::selection_scratch selection;
  };

  template <backend Backend, attention_layer Layer>
  [[nodiscard]] buffers<Backend> carve(arena& from, const Backend& exec,
                                       const Layer& layer) const noexcept {
    const index_t sequences = layer.sequences(), capacity = layer.capacity();
    return {from.array<float>(sequences, layer.kv_heads(), capacity),
            from.array<double>(sequences, capacity), from.array<token_quota>(sequences),
            ops<Backend>::carve_attention_scratch(from, exec, detail::most_rows(layer, 1),
                                                  detail::plain(layer)),
            ops<Backend>::carve_selection_scratch(from, exec, detail::plain(layer))};
  }

  /// Writes the kept tokens. `reduce` sums scores [sequence, capacity] over the ranks, so that all
  /// ranks keep the same tokens.
  template <backend Backend, attention_layer Layer, head_reduction Reduce>
  status select(const Backend& exec, const Layer& layer, const buffers<Backend>& work,
                const decision<typename Layer::memory>& kept, const Reduce& reduce) const noexcept {
    using run = ops<Backend>;
    using scores_type = scores_view<typename Layer::memory>;
    const auto& plain = detail::plain(layer);
    const index_t sequences = layer.sequences(), heads = layer.kv_heads(),
                  capacity = layer.capacity();
    const index_t entries = sequences * capacity;
    const scores_type scores(work.scores, {sequences, heads, capacity});
    // All KV heads read the scores of head 0, which assign_sum overwrites with the layer's.
    const scores_type shared(work.scores, {sequences, heads, capacity}, {heads * capacity, 0, 1});
    using quotas = typename score_ranking<tova>::template assign_quota<Layer>;
    status s = run::for_each_sequence(exec, sequences, quotas{layer, work.quotas, *this});
    if (s == status::ok) {
      s = run::attention_sums(exec, score_rows{detail::most_rows(layer, 1)}, plain, scores,
                              kept.counts, work.attention);
    }
    if (s == status::ok) {
      s = run::for_each_sequence(exec, entries, sum_heads<Layer>{layer, scores, work.sums});
    }
    if (s == status::ok) s = reduce(work.sums, entries);
    if (s == status::ok) {
      s = run::for_each_sequence(exec, entries, assign_sum<Layer>{layer, scores, work.sums});
    }
    if (s == status::ok) {
      s = run::top_tokens(exec, detail::quotas_by_sequence(work.quotas, plain), plain, shared, kept,
                          work.selection);
    }
    return s;
  }

  /// Returns the quota of a sequence of `tokens` tokens. O(1).
  [[nodiscard]] REFREEKV_HOST_DEVICE token_quota operator()(index_t tokens) const noexcept {
    return token_quota::of(budget.of(tokens), 1);
  }

  // Public, because device code requires it. Each call handles one token, not a sequence: a device
  // thread that read a whole sequence alone would run longer than the attention before it.
  template <class Layer>
  struct sum_heads {
    Layer layer;
    scores_view<typename Layer::memory> scores;  // [sequence, kv_head, capacity]
    double* sums;                                // [sequence, capacity]
    REFREEKV_HOST_DEVICE void operator()(index_t i) const noexcept {
      const index_t s = i / layer.capacity(), t = i % layer.capacity();
      const index_t heads = t < layer.tokens(s) ? layer.kv_heads() : 0;
      double sum = 0;
      for (index_t h = 0; h < heads; ++h) sum += static_cast<double>(scores(s, h, t));
      sums[i] = sum;
    }
  };
  template <class Layer>
  struct assign_sum {
    Layer layer;
    scores_view<typename Layer::memory> scores;
    const double* sums;  // [sequence, capacity]
    REFREEKV_HOST_DEVICE void operator()(index_t i) const noexcept {
      const index_t s = i / layer.capacity(), t = i % layer.capacity();
      if (t < layer.tokens(s)) scores(s, 0, t) = static_cast<float>(sums[i]);
    }
  };
};

}  // namespace refreekv::inline v0::policy
