// SPDX-License-Identifier: Apache-2.0
// CAKE (arXiv 2503.12491): one budget for all layers, shared out by how they attend.
//
// A layer whose attention is spread out and changes from row to row gets more. Its tokens are
// scored by their mean attention from the window plus a multiple of its variance, pooled. As layers
// are prefilled one after the other, budgets are shared anew among those there are, and earlier
// layers give up what they have too much: a cascade. The integer rules are those of the authors'
// code.
#pragma once

#include "refreekv/policy/cake_layers.hpp"
#include "refreekv/policy/score_ranking.hpp"

namespace refreekv::inline v0::policy {

/// To be observed with_layers(...). With the queries of a layer that was just prefilled it scores
/// the layer's tokens and notes its preference; then, and for earlier layers, it keeps what the
/// layer's budget holds. Selecting all layers again after each one is the cascade. A sequence
/// without a row keeps its scores and its preference; one whose rows are all NaN has scores of 0
/// and no preference, so budgets are the same for all layers.
struct cake {
  template <class Memory>
  using decision = kept_positions<Memory>;

  token_budget budget = 1024;  ///< tokens of the mean layer, the window's included
  /// Last queries that give scores, all there are if fewer, and last tokens, which stay; at
  /// least 1.
  count_t window = 32;
  count_t layers = 32;        ///< of the model
  double gamma = 200;         ///< weight of the variance, at least 0
  double tau1 = 1, tau2 = 1;  ///< preference = entropy^(1 / tau1) * variance^(1 / tau2); positive
  pooling pool = {pool_kind::average, 5};

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (!budget.valid()) return "budget must be >= 0 tokens, or a share in [0, 1]";
    if (window < 1 || window > max_count) return "window must be >= 1";
    if (layers < 1 || layers > max_count) return "layers must be >= 1";
    if (!(gamma >= 0 && gamma <= 1e30)) return "gamma must be >= 0";
    if (!(tau1 > 0 && tau2 > 0)) return "tau1 and tau2 must be > 0";
    if (!pool.valid()) return "pool.width must be odd";
    return nullptr;
  }
  /// The observation says which layer it is of.
  template <observation Seen>
  [[nodiscard]] constexpr const char* invalid(const Seen& seen) const noexcept {
    if (seen.info.layer == unknown_layer)
      return "layer_info::layer is not set: budgets depend on it";
    if (seen.layers.finished > layers) return "more layers are finished than the rule has";
    return nullptr;
  }
  template <class Backend>
  struct buffers {
    token_quota* quotas;  ///< [sequence]
    typename ops<Backend>::selection_scratch selection;
    // Of layers that were just prefilled:
    float* raw;      ///< [sequence, kv_head, capacity]
    double* totals;  ///< [sequence, 2]
    typename ops<Backend>::attention_scratch attention;
  };

  template <backend Backend, observation Seen>
  [[nodiscard]] buffers<Backend> take(arena& from, const Backend& on,
                                      const Seen& seen) const noexcept {
    buffers<Backend> work{};
    work.quotas = from.take<token_quota>(seen.sequences());
    work.selection = ops<Backend>::take_selection_scratch(from, on, observed(seen));
    if constexpr (attention_observation<Seen>) {
      work.raw = from.take<float>(seen.sequences(), seen.kv_heads(), seen.capacity());
      work.totals = from.take<double>(seen.sequences(), 2);
      work.attention = ops<Backend>::take_attention_scratch(
          from, on, detail::most_rows(seen, window), observed(seen));
    }
    return work;
  }

  /// `reduce` sums entropies and variances [sequence, 2]: ranks share a layer's budget.
  template <backend Backend, observation Seen, reduction Reduce>
  status select(const Backend& on, const Seen& seen, const buffers<Backend>& work,
                const decision<typename Seen::memory>& kept, const Reduce& reduce) const noexcept {
    using run = ops<Backend>;
    const auto& what = observed(seen);
    status s = status::ok;
    if constexpr (attention_observation<Seen>) {
      const scores_view<typename Seen::memory> raw(
          work.raw, {seen.sequences(), seen.kv_heads(), seen.capacity()});
      s = run::attention_spread(on, detail::most_rows(seen, window), window, gamma, what, raw,
                                kept.counts, work.totals, work.attention);
      if (s == status::ok) s = reduce(work.totals, 2 * seen.sequences());
      if (s == status::ok) {
        s = run::for_each_sequence(
            on, seen.sequences(),
            assign_preference<cake, Seen>{*this, seen, kept.counts, work.totals, work.quotas});
      }
      if (s == status::ok) s = run::pool(on, pool, work.quotas, what, raw, seen.layers.scores);
    }
    if (s == status::ok) {
      s = run::for_each_sequence(on, seen.sequences(),
                                 assign_quota<cake, Seen>{*this, seen, kept.counts, work.quotas});
    }
    if (s == status::ok) {
      s = run::top_tokens(on, quotas_by_sequence(work.quotas, what), what, seen.layers.scores, kept,
                          work.selection);
    }
    return s;
  }

  /// What stays of a layer, by the preferences [finished] with a stride. O(finished)
  [[nodiscard]] REFREEKV_HOST_DEVICE token_quota quota(const double* preferences, index_t stride,
                                                       index_t finished, index_t layer,
                                                       index_t prompt) const noexcept {
    const index_t most = budget.of(prompt), recent = window;
    if (prompt <= most + recent) return token_quota::all();
    const index_t total = most > recent ? (most - recent) * layers : 0;
    return {cake_budget(preferences, stride, finished, layer, total, prompt - recent), recent};
  }

  // Public, as device code wants them.
  template <class Rule, class Seen>
  struct assign_preference {
    Rule rule;
    Seen seen;
    view<kept_count, 2, typename Seen::memory> counts;
    const double* totals;  // [sequence, 2]
    token_quota* quotas;   // what is not pooled, until there are budgets
    REFREEKV_HOST_DEVICE void operator()(index_t s) const noexcept {
      // A sequence that shows no row keeps the scores and the preference that it has.
      const bool looks = window_of(seen, s, detail::most_rows(seen, rule.window)).count() > 0;
      quotas[s] = {0, looks ? index_t{rule.window} : index_t{max_count}};
      if (!looks) return;
      const double preference =
          std::pow(totals[2 * s], 1 / rule.tau1) * std::pow(totals[2 * s + 1], 1 / rule.tau2);
      bool undecided = false;
      for (index_t h = 0; h < seen.kv_heads(); ++h) undecided |= counts(s, h).undecided;
      // Of rows that are all left out nothing is known.
      seen.layers.preferences(s, seen.info.layer) =
          undecided && !(preference > 0) ? static_cast<double>(NAN) : preference;
    }
  };
  template <class Rule, class Seen>
  struct assign_quota {
    Rule rule;
    Seen seen;
    view<kept_count, 2, typename Seen::memory> counts;
    token_quota* quotas;
    REFREEKV_HOST_DEVICE void operator()(index_t s) const noexcept {
      for (index_t h = 0; !attention_observation<Seen> && h < seen.kv_heads(); ++h) {
        counts(s, h).undecided = false;
      }
      const auto& [scores, preferences, finished, prompts] = seen.layers;
      const index_t prompt = prompts.data() != nullptr ? index_t{prompts(s)} : seen.tokens(s);
      quotas[s] =
          rule.quota(preferences.at(s), preferences.stride(1), finished, seen.info.layer, prompt);
    }
  };
};

/// A step of decoding in a layer: the attention of the last row alone, pooled along the slots.
struct cake_decode {
  template <class Memory>
  using decision = kept_positions<Memory>;

  count_t budget = 992;  ///< of the layer, the recent ones not included: its last cake_budget
  count_t recent = 32;   ///< last tokens, which stay: cake's window
  pooling pool = {pool_kind::average, 5};

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (budget > max_count) return "budget must be >= 0";
    if (recent > max_count) return "recent must be >= 0";
    if (!pool.valid()) return "pool.width must be odd";
    return nullptr;
  }
  [[nodiscard]] constexpr const char* invalid(const attention_observation auto&) const noexcept {
    return nullptr;
  }
  [[nodiscard]] constexpr auto method(const attention_observation auto& seen) const noexcept {
    return score_ranking<cake_decode>{detail::most_rows(seen, 1), pool, false, *this};
  }

  /// What stays of a sequence. O(1)
  [[nodiscard]] REFREEKV_HOST_DEVICE token_quota operator()(index_t) const noexcept {
    return token_quota::of(index_t{budget} + recent, recent);
  }
};

}  // namespace refreekv::inline v0::policy
