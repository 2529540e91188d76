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
  bool carried;  ///< scores are the caller's and go on from what they were
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

  template <backend Backend, attention_observation Seen>
  [[nodiscard]] buffers<Backend> take(arena& from, const Backend& on,
                                      const Seen& seen) const noexcept {
    using run = ops<Backend>;
    const index_t sequences = seen.sequences(), heads = seen.kv_heads();
    buffers<Backend> work{};
    if (!carried) work.scores = from.take<float>(sequences, heads, seen.capacity());
    if (pool.width > 1) work.pooled = from.take<float>(sequences, heads, seen.capacity());
    work.quotas = from.take<token_quota>(sequences);
    work.attention = run::take_attention_scratch(from, on, rows, observed(seen));
    work.selection = run::take_selection_scratch(from, on, observed(seen));
    if (shares()) {
      work.shared = from.take<token_quota>(sequences, heads);
      work.sharing = run::take_sharing_scratch(from, on, observed(seen));
    }
    return work;
  }

  template <backend Backend, attention_observation Seen>
  status select(const Backend& on, const Seen& seen, const buffers<Backend>& work,
                const kept_positions<typename Seen::memory>& kept,
                const reduction auto&) const noexcept {
    using run = ops<Backend>;
    using scores_type = scores_view<typename Seen::memory>;
    const auto& what = observed(seen);
    const auto own = [&](float* data) {
      return scores_type(data, {seen.sequences(), seen.kv_heads(), seen.capacity()});
    };
    scores_type scores = own(work.scores);
    if constexpr (requires { seen.scores; }) scores = carried ? seen.scores : scores;
    status s =
        run::for_each_sequence(on, seen.sequences(), assign_quota<Seen>{seen, work.quotas, quota});
    if (s == status::ok) {
      s = run::attention_sums(on, score_rows{rows, carried}, what, scores, kept.counts,
                              work.attention);
    }
    if (s == status::ok && pool.width > 1) {
      s = run::pool(on, pool, work.quotas, what, scores, own(work.pooled));
      scores = own(work.pooled);
    }
    auto quotas = quotas_by_sequence(work.quotas, what);
    if constexpr (requires { quota.head_floor; }) {
      if (s == status::ok && shares()) {
        s = run::share_quotas(on, quota.head_floor, work.quotas, what, scores, work.shared,
                              work.sharing);
        quotas = {work.shared, {what.sequences(), what.kv_heads()}};
      }
    }
    if (s == status::ok) s = run::top_tokens(on, quotas, what, scores, kept, work.selection);
    return s;
  }

  [[nodiscard]] constexpr bool shares() const noexcept {
    if constexpr (requires { quota.head_floor; }) {
      return quota.head_floor < 1;
    } else {
      return false;
    }
  }

  template <class Seen>
  struct assign_quota {  // public, as device code wants it
    Seen seen;
    token_quota* quotas;
    Quota quota;
    REFREEKV_HOST_DEVICE void operator()(index_t s) const noexcept {
      quotas[s] = quota(seen.tokens(s));
    }
  };
};

}  // namespace refreekv::inline v0
