// SPDX-License-Identifier: Apache-2.0
// Keeping the tokens that receive the most attention: the part that H2O, SnapKV, PyramidKV and the
// decoding of CAKE share.
#pragma once

#include "refreekv/policy/budget.hpp"
#include "refreekv/policy/policy.hpp"

namespace refreekv::inline v0 {

/// Scores a sequence's tokens by the attention of the last rows, pools them, and keeps the best and
/// the most recent ones.
template <class Quota>
struct score_ranking {
  index_t rows;  ///< of the observation
  pooling pool;  ///< width 1 for none
  bool carried;  ///< scores are the caller's and go on from plain they were
  /// Device-callable: the token_quota of a number of tokens. Where it has a `head_floor` below 1,
  /// KV heads share it.
  Quota quota;

  template <class Backend>
  struct buffers {
    float* scores;        ///< [sequence, kv_head, capacity]; null where they are the caller's
    float* pooled;        ///< the same; null for no pooling
    token_quota* quotas;  ///< [sequence]
    token_quota* shared;  ///< [sequence, kv_head]; null where KV heads share nothing
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

  [[nodiscard]] constexpr bool shares() const noexcept {
    if constexpr (requires { quota.head_floor; }) {
      return quota.head_floor < 1;
    } else {
      return false;
    }
  }

  template <class Layer>
  struct assign_quota {  // public, as device code wants it
    Layer layer;
    token_quota* quotas;
    Quota quota;
    REFREEKV_HOST_DEVICE void operator()(index_t s) const noexcept {
      quotas[s] = quota(layer.tokens(s));
    }
  };
};

}  // namespace refreekv::inline v0
