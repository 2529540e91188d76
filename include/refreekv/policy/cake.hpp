// SPDX-License-Identifier: Apache-2.0
// CAKE (arXiv 2503.12491): one budget for all layers, divided by how they attend.
//
// A layer whose attention is spread out and changes from row to row receives a larger budget. A
// token's score is its mean attention from the window plus a multiple of the variance, pooled.
// Layers are prefilled one after the other. After each, the budget is divided anew among the layers
// so far, and earlier layers drop the tokens above their new budgets: a cascade. Integers are
// rounded as in the authors' code.
#pragma once

#include "refreekv/policy/cake_layers.hpp"
#include "refreekv/policy/score_ranking.hpp"

namespace refreekv::inline v0::policy {

/// Requires a layer from with_layers(...), with its number set (layer_info::index). If the layer
/// has queries, it was just prefilled: select writes its tokens' scores and its preference. Then,
/// and for earlier layers, select keeps as many tokens as the layer's budget holds. Selecting all
/// layers again after each prefill is the cascade. A sequence without a row keeps its scores and
/// its preference. If all rows are NaN, scores are 0 and there is no preference: budgets are then
/// the same for all layers.
struct cake {
  template <class Memory>
  using decision = kept_positions<Memory>;

  token_budget budget = 1024;  ///< tokens of the mean layer, those of the window included
  /// Number of last queries that score tokens, and of last tokens that always stay. At least 1. If
  /// there are fewer queries, all of them.
  count_t window = 32;
  count_t layers = 32;        ///< number of layers of the model
  double gamma = 200;         ///< weight of the variance, at least 0
  double tau1 = 1, tau2 = 1;  ///< preference = entropy^(1 / tau1) * variance^(1 / tau2); positive
  pooling pool = {pool_kind::average, 5};

  static constexpr const char* name = "cake";
  static constexpr std::tuple options{
      option{"budget", &cake::budget, "tokens of the mean layer, those of the window included"},
      option{"window", &cake::window, "last queries that give scores, and last tokens that stay",
             at_least_one},
      option{"layers", &cake::layers, "layers of the model", at_least_one},
      option{"gamma", &cake::gamma, "weight of the variance", option_range{0, 1e30, ">= 0"}},
      option{"tau1", &cake::tau1, "temperature of the entropy", positive},
      option{"tau2", &cake::tau2, "temperature of the variance", positive},
      option{"pool", &cake::pool, "how scores of neighbours are pooled"}};

  /// Null, or the error that the layer's number is not set, or that more layers are finished than
  /// `layers`. O(1).
  template <model_layer Layer>
  [[nodiscard]] constexpr const char* invalid(const Layer& layer) const noexcept {
    if (layer.info.index == unknown_layer)
      return "layer_info::index is not set: budgets depend on it";
    if (layer.layers.finished > layers) return "more layers are finished than the policy has";
    return nullptr;
  }
  template <class Backend>
  struct buffers {
    token_quota* quotas;  ///< [sequence]
    typename ops<Backend>::selection_scratch selection;
    // Only for layers with queries, which were just prefilled:
    float* raw;      ///< [sequence, kv_head, capacity]
    double* totals;  ///< [sequence, 2]: entropy, variance
    typename ops<Backend>::attention_scratch attention;
  };

  template <backend Backend, model_layer Layer>
    requires requires(const Layer& layer) { layer.layers; }
  [[nodiscard]] buffers<Backend> carve(arena& from, const Backend& exec,
                                       const Layer& layer) const noexcept {
    buffers<Backend> work{};
    work.quotas = from.array<token_quota>(layer.sequences());
    work.selection = ops<Backend>::carve_selection_scratch(from, exec, detail::plain(layer));
    if constexpr (attention_layer<Layer>) {
      work.raw = from.array<float>(layer.sequences(), layer.kv_heads(), layer.capacity());
      work.totals = from.array<double>(layer.sequences(), 2);
      work.attention = ops<Backend>::carve_attention_scratch(
          from, exec, detail::most_rows(layer, window), detail::plain(layer));
    }
    return work;
  }

  /// Writes the kept tokens. With queries, also scores and preferences of the layer. `reduce` sums
  /// entropies and variances [sequence, 2] over the ranks, because ranks share a layer's budget.
  template <backend Backend, model_layer Layer, head_reduction Reduce>
  status select(const Backend& exec, const Layer& layer, const buffers<Backend>& work,
                const decision<typename Layer::memory>& kept, const Reduce& reduce) const noexcept {
    using run = ops<Backend>;
    const auto& plain = detail::plain(layer);
    status s = status::ok;
    if constexpr (attention_layer<Layer>) {
      const scores_view<typename Layer::memory> raw(
          work.raw, {layer.sequences(), layer.kv_heads(), layer.capacity()});
      s = run::attention_spread(exec, detail::most_rows(layer, window), window, gamma, plain, raw,
                                kept.counts, work.totals, work.attention);
      if (s == status::ok) s = reduce(work.totals, 2 * layer.sequences());
      if (s == status::ok) {
        s = run::for_each_sequence(
            exec, layer.sequences(),
            assign_preference<cake, Layer>{*this, layer, kept.counts, work.totals, work.quotas});
      }
      if (s == status::ok) s = run::pool(exec, pool, work.quotas, plain, raw, layer.layers.scores);
    }
    if (s == status::ok) {
      s = run::for_each_sequence(exec, layer.sequences(),
                                 assign_quota<cake, Layer>{*this, layer, kept.counts, work.quotas});
    }
    if (s == status::ok) {
      s = run::top_tokens(exec, detail::quotas_by_sequence(work.quotas, plain), plain,
                          layer.layers.scores, kept, work.selection);
    }
    return s;
  }

  /// Returns the quota of a sequence in a layer. preferences: [finished], with a stride; prompt: in
  /// tokens. O(finished).
  [[nodiscard]] REFREEKV_HOST_DEVICE token_quota quota(const double* preferences, index_t stride,
                                                       index_t finished, index_t layer,
                                                       index_t prompt) const noexcept {
    const index_t most = budget.of(prompt), recent = window;
    if (prompt <= most + recent) return token_quota::all();
    const index_t total = most > recent ? (most - recent) * layers : 0;
    return {detail::cake_budget(preferences, stride, finished, layer, total, prompt - recent),
            recent};
  }

  // Public, because device code requires it.
  template <class Policy, class Layer>
  struct assign_preference {
    Policy policy;
    Layer layer;
    view<kept_tokens, 2, typename Layer::memory> counts;
    const double* totals;  // [sequence, 2]: entropy, variance
    token_quota* quotas;   // [sequence]: until there are budgets, the tokens that are not pooled
    REFREEKV_HOST_DEVICE void operator()(index_t s) const noexcept {
      // Without a row nothing is pooled, so that the old scores and the old preference stay.
      const bool looks = window_of(layer, s, detail::most_rows(layer, policy.window)).count() > 0;
      quotas[s] = {0, looks ? index_t{policy.window} : index_t{max_count}};
      if (!looks) return;
      const double preference =
          std::pow(totals[2 * s], 1 / policy.tau1) * std::pow(totals[2 * s + 1], 1 / policy.tau2);
      bool undecided = false;
      for (index_t h = 0; h < layer.kv_heads(); ++h) undecided |= counts(s, h).undecided;
      // If all rows were left out, the preference is unknown.
      layer.layers.preferences(s, layer.info.index) =
          undecided && !(preference > 0) ? static_cast<double>(NAN) : preference;
    }
  };
  template <class Policy, class Layer>
  struct assign_quota {
    Policy policy;
    Layer layer;
    view<kept_tokens, 2, typename Layer::memory> counts;
    token_quota* quotas;
    REFREEKV_HOST_DEVICE void operator()(index_t s) const noexcept {
      for (index_t h = 0; !attention_layer<Layer> && h < layer.kv_heads(); ++h) {
        counts(s, h).undecided = false;
      }
      const auto& [scores, preferences, finished, prompts] = layer.layers;
      const index_t prompt = prompts.data() != nullptr ? index_t{prompts(s)} : layer.tokens(s);
      quotas[s] = policy.quota(preferences.at(s), preferences.stride(1), finished, layer.info.index,
                               prompt);
    }
  };
};

/// CAKE's decoding step in one layer: scores are the attention of the last row alone, pooled along
/// the slots.
struct cake_decode {
  template <class Memory>
  using decision = kept_positions<Memory>;

  count_t budget = 992;  ///< tokens of the layer without the recent ones: its last cake_budget
  count_t recent = 32;   ///< last tokens, which always stay: cake's window
  pooling pool = {pool_kind::average, 5};

  static constexpr const char* name = "cake_decode";
  static constexpr std::tuple options{
      option{"budget", &cake_decode::budget, "tokens that stay, the recent ones not included"},
      option{"recent", &cake_decode::recent, "last tokens that always stay"},
      option{"pool", &cake_decode::pool, "how scores of neighbours are pooled"}};

  [[nodiscard]] constexpr auto method(const attention_layer auto& layer) const noexcept {
    return score_ranking<cake_decode>{detail::most_rows(layer, 1), pool, false, *this};
  }

  /// Returns the quota of a sequence, whatever its length. O(1).
  [[nodiscard]] REFREEKV_HOST_DEVICE token_quota operator()(index_t) const noexcept {
    return token_quota::of(index_t{budget} + recent, recent);
  }
};

}  // namespace refreekv::inline v0::policy
