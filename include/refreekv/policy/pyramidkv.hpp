// SPDX-License-Identifier: Apache-2.0
// PyramidKV (arXiv 2406.02069): SnapKV's scores, with budgets that shrink from layer to layer.
//
// The first layer has the most, the last one 1 / beta of the mean, and those between lie on a line.
// The rule is that of the authors' code (KVCache-Factory), integers and all; the paper's own is the
// same line in real numbers, which pyramid_step::exact keeps to.
#pragma once

#include "refreekv/policy/score_ranking.hpp"

namespace refreekv::inline v0::policy {

/// How the line becomes whole tokens. A step from layer to layer that is rounded down leaves all of
/// them more than their budget: of 64 tokens in 32 layers, with a window of 8, 71.5 in the mean.
enum class pyramid_step {
  between_layers,  ///< the difference of first and last over layers - 1: KVCache-Factory
  over_layers,     ///< over layers: its older versions, and the code of arXiv 2502.16886
  /// The line itself, rounded so that all layers together hold layers * budget tokens: a layer is
  /// less than one token off the line, so that it may have one more than the layer before. (ours)
  exact,
};

[[nodiscard]] constexpr auto choices_of(pyramid_step) noexcept {
  return std::array{choice{"between_layers", pyramid_step::between_layers},
                    choice{"over_layers", pyramid_step::over_layers},
                    choice{"exact", pyramid_step::exact}};
}

struct pyramidkv {
  template <class Memory>
  using decision = kept_positions<Memory>;

  /// Tokens of the mean layer, the window's included; in fact more, see pyramid_step. For an engine
  /// that has room for layers * budget tokens and no more: `.step = pyramid_step::exact`, with a
  /// budget that is no smaller than the window, which always stays.
  token_budget budget = 2048;
  /// Last queries that give scores, all there are if fewer, and last tokens, which stay; at
  /// least 1.
  count_t window = 8;
  pooling pool = {pool_kind::max, 7};
  count_t beta = 20;    ///< at least 1
  count_t layers = 32;  ///< of the model; the observation says which one it is
  pyramid_step step = pyramid_step::between_layers;

  static constexpr const char* name = "pyramidkv";
  static constexpr std::tuple options{
      option{"budget", &pyramidkv::budget,
             "tokens of the mean layer, those of the window included"},
      option{"window", &pyramidkv::window,
             "last queries that give scores, and last tokens that stay", at_least_one},
      option{"pool", &pyramidkv::pool, "how scores of neighbours are pooled"},
      option{"beta", &pyramidkv::beta, "how steeply budgets fall from layer to layer",
             at_least_one},
      option{"layers", &pyramidkv::layers, "of the model", at_least_one},
      option{"step", &pyramidkv::step, "how budgets become whole numbers"}};

  /// The observation says which layer it is of.
  template <attention_layer Layer>
  [[nodiscard]] constexpr const char* invalid(const Layer& layer) const noexcept {
    if (layer.info.index == unknown_layer)
      return "layer_info::index is not set: budgets depend on it";
    if (layer.info.index >= layers) return "layer_info::index must be below the policy's layers";
    return nullptr;
  }
  [[nodiscard]] constexpr auto method(const attention_layer auto& layer) const noexcept {
    using quota = layer_quota<pyramidkv>;
    return score_ranking<quota>{detail::most_rows(layer, window), pool, false,
                                quota{*this, layer.info.index}};
  }

  /// What stays of a sequence in a layer. O(1)
  [[nodiscard]] REFREEKV_HOST_DEVICE token_quota quota(index_t layer,
                                                       index_t tokens) const noexcept {
    const index_t most = budget.of(tokens);
    if (tokens <= most) return token_quota::all();
    const index_t mean = most > window ? most - window : 0;
    if (tokens < 2 * mean) return {mean, window};
    index_t last = mean / beta;
    index_t first = 2 * mean - last;
    const index_t others = tokens > window ? tokens - window : 0;
    if (first >= others) {
      first = others;
      last = 2 * mean - first;
    }
    if (step == pyramid_step::exact) {
      return {mean + above_mean(first - mean, layer + 1) - above_mean(first - mean, layer), window};
    }
    const index_t steps = step == pyramid_step::over_layers || layers == 1 ? layers : layers - 1;
    return {first - layer * ((first - last) / steps), window};
  }

  template <class Policy>
  struct layer_quota {  // public, as device code wants it
    Policy policy;
    index_t layer;
    REFREEKV_HOST_DEVICE token_quota operator()(index_t tokens) const noexcept {
      return policy.quota(layer, tokens);
    }
  };

 private:
  /// What the first `count` layers have together above the mean, rounded, on the line that starts
  /// `slope` above it and ends as much below: slope * count * (layers - count) / (layers - 1).
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t above_mean(index_t slope,
                                                                  index_t count) const noexcept {
    const index_t area = count * (layers - count), steps = layers == 1 ? 1 : layers - 1;
    // In two parts: the product alone may have 91 bits.
    return slope * (area / steps) + (slope * (area % steps) + steps / 2) / steps;
  }
};

}  // namespace refreekv::inline v0::policy
