// SPDX-License-Identifier: Apache-2.0
// PyramidKV (arXiv 2406.02069): SnapKV's scores, with budgets that shrink from layer to layer.
//
// The first layer has the largest budget, the last one 1 / beta of the mean; those between lie on a
// line. Budgets are computed in integers, as in the authors' code (KVCache-Factory). The paper has
// this line in real numbers; pyramid_step::exact follows it.
#pragma once

#include "refreekv/policy/score_ranking.hpp"

namespace refreekv::inline v0::policy {

/// How the line is rounded to whole tokens. If the step from layer to layer is rounded down, the
/// layers together keep more than their budget. With a budget of 64 tokens, 32 layers and a window
/// of 8, the mean layer keeps 71.5 tokens.
enum class pyramid_step {
  between_layers,  ///< (first - last) / (layers - 1), rounded down: KVCache-Factory
  /// (first - last) / layers, rounded down: older versions of KVCache-Factory, and the code of
  /// arXiv 2502.16886.
  over_layers,
  /// The line itself, rounded so that all layers together hold layers * budget tokens. A layer is
  /// less than one token off the line, so it may have one token more than the layer before. (ours)
  exact,
};

[[nodiscard]] constexpr auto choices_of(pyramid_step) noexcept {
  return std::array{choice{"between_layers", pyramid_step::between_layers},
                    choice{"over_layers", pyramid_step::over_layers},
                    choice{"exact", pyramid_step::exact}};
}

/// Requires the layer's number (layer_info::index), below `layers`.
struct pyramidkv {
  template <class Memory>
  using decision = kept_positions<Memory>;

  /// Tokens of the mean layer, those of the window included. In fact layers keep more: see
  /// pyramid_step. An engine with memory for exactly layers * budget tokens requires
  /// `.step = pyramid_step::exact`, and a budget of at least the window, which always stays.
  token_budget budget = 2048;
  /// Number of last queries that score tokens, and of last tokens that always stay. At least 1. If
  /// there are fewer queries, all of them.
  count_t window = 8;
  pooling pool = {pool_kind::max, 7};
  count_t beta = 20;    ///< at least 1
  count_t layers = 32;  ///< number of layers of the model
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
      option{"layers", &pyramidkv::layers, "layers of the model", at_least_one},
      option{"step", &pyramidkv::step, "how budgets become whole numbers"}};

  /// Null, or the error that the layer's number is not set or not below `layers`. O(1).
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

  /// Returns the quota of a sequence of `tokens` tokens in a layer. O(1).
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
  struct layer_quota {  // public, because device code requires it
    Policy policy;
    index_t layer;
    REFREEKV_HOST_DEVICE token_quota operator()(index_t tokens) const noexcept {
      return policy.quota(layer, tokens);
    }
  };

 private:
  /// The tokens of the first `count` layers together above the mean, rounded. The line starts
  /// `slope` tokens above the mean and ends as many below: slope * count * (layers - count) /
  /// (layers - 1).
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t above_mean(index_t slope,
                                                                  index_t count) const noexcept {
    const index_t area = count * (layers - count), steps = layers == 1 ? 1 : layers - 1;
    // In two parts, because the product alone may have 91 bits.
    return slope * (area / steps) + (slope * (area % steps) + steps / 2) / steps;
  }
};

}  // namespace refreekv::inline v0::policy
