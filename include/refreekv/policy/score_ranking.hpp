// SPDX-License-Identifier: Apache-2.0
// Keeps the tokens that receive the most attention: the method that H2O, SnapKV, PyramidKV and
// CAKE's decoding share.
#pragma once

#include "refreekv/policy/budget.hpp"
#include "refreekv/policy/policy.hpp"

namespace refreekv::inline v0 {

/// Scores a sequence's tokens by the attention of the last rows, pools the scores, and keeps the
/// tokens with the highest scores and the most recent ones.
template <class Quota>
struct score_ranking {
  index_t rows;  ///< last rows of the layer's window that score tokens
  pooling pool;  ///< width 1: scores are not pooled
  bool carried;  ///< the caller owns the scores, and new attention is added to them
  /// Device-callable: quota(tokens) returns the token_quota of a sequence of `tokens` tokens. If it
  /// has a member `head_floor` below 1, the KV heads of a layer share their quotas.
  Quota quota;

  template <class Backend>
  struct buffers {
    float* scores;        ///< [sequence, kv_head, capacity]; null if the caller owns them
    float* pooled;        ///< [sequence, kv_head, capacity]; null without pooling
    token_quota* quotas;  ///< [sequence]
    token_quota* shared;  ///< [sequence, kv_head]; null unless KV heads share quotas
    typename ops<Backend>::attention_scratch attention;
    typename ops<Backend>::selection_scratch selection;
    typename ops<Backend>::sharing_scratch sharing;
  };

  template <backend Backend, attention_layer Layer>
  [[nodiscard]] buffers<Backend> carve(arena& from, const Backend& exec,
                                       const Layer& layer) const noexcept {
    using run = ops<Backend>;
    const index_t sequences = layer.sequences(), heads = layer.kv_heads();
    buffers<Backend> work{};
    if (!carried) work.scores = from.array<float>(sequences, heads, layer.capacity());
    if (pool.width > 1) work.pooled = from.array<float>(sequences, heads, layer.capacity());
    work.quotas = from.array<token_quota>(sequences);
    work.attention = run::carve_attention_scratch(from, exec, rows, detail::plain(layer));
    work.selection = run::carve_selection_scratch(from, exec, detail::plain(layer));
    if (shares()) {
      work.shared = from.array<token_quota>(sequences, heads);
      work.sharing = run::carve_sharing_scratch(from, exec, detail::plain(layer));
    }
    return work;
  }

  template <backend Backend, attention_layer Layer>
  status select(const Backend& exec, const Layer& layer, const buffers<Backend>& work,
                const kept_positions<typename Layer::memory>& kept,
                const head_reduction auto&) const noexcept {
    using run = ops<Backend>;
    using scores_type = scores_view<typename Layer::memory>;
    const auto& plain = detail::plain(layer);
    const auto own = [&](float* data) {
      return scores_type(data, {layer.sequences(), layer.kv_heads(), layer.capacity()});
    };
    scores_type scores = own(work.scores);
    if constexpr (requires { layer.scores; }) scores = carried ? layer.scores : scores;
    status s = run::for_each_sequence(exec, layer.sequences(),
                                      assign_quota<Layer>{layer, work.quotas, quota});
    if (s == status::ok) {
      s = run::attention_sums(exec, score_rows{rows, carried}, plain, scores, kept.counts,
                              work.attention);
    }
    if (s == status::ok && pool.width > 1) {
      s = run::pool(exec, pool, work.quotas, plain, scores, own(work.pooled));
      scores = own(work.pooled);
    }
    auto quotas = detail::quotas_by_sequence(work.quotas, plain);
    if constexpr (requires { quota.head_floor; }) {
      if (s == status::ok && shares()) {
        s = run::share_quotas(exec, quota.head_floor, work.quotas, plain, scores, work.shared,
                              work.sharing);
        quotas = {work.shared, {plain.sequences(), plain.kv_heads()}};
      }
    }
    if (s == status::ok) s = run::top_tokens(exec, quotas, plain, scores, kept, work.selection);
    return s;
  }

  /// Whether the KV heads of a layer share their quotas. O(1).
  [[nodiscard]] constexpr bool shares() const noexcept {
    if constexpr (requires { quota.head_floor; }) {
      return quota.head_floor < 1;
    } else {
      return false;
    }
  }

  template <class Layer>
  struct assign_quota {  // public, because device code requires it
    Layer layer;
    token_quota* quotas;
    Quota quota;
    REFREEKV_HOST_DEVICE void operator()(index_t s) const noexcept {
      quotas[s] = quota(layer.tokens(s));
    }
  };
};

}  // namespace refreekv::inline v0
