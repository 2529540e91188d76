// SPDX-License-Identifier: Apache-2.0
// H2O (arXiv 2306.14048): keeps the tokens that received the most attention so far, and the recent
// ones.
//
// After a prefill a token's score is the attention that it received from the rows of the window.
// The window is all queries in the paper, and the last 8 in the code that arXiv 2502.16886 compares
// with. While decoding, each step adds its row to scores that the caller owns, and drops the tokens
// above the budget.
#pragma once

#include "refreekv/policy/score_ranking.hpp"

namespace refreekv::inline v0::policy {

/// To decode, pass the layer with_scores(observe(queries, keys), scores). The attention of all its
/// rows is added in place to scores [sequence, kv_head, capacity]. The rows' own tokens are new,
/// and start at 0; if info.rows.ends is set, the caller sets the scores of new tokens to 0. All
/// older tokens require a score: if only the last rows of a prompt are passed, set its scores to 0
/// before. Compact the scores with the cache, as a source of head_dim 1. Sliding windows and ALiBi
/// require an unpruned cache (see attention_params).
struct h2o {
  template <class Memory>
  using decision = kept_positions<Memory>;

  token_budget budget = 2048;  ///< tokens, the recent ones included
  /// Last tokens, which stay whatever the budget is: a number of tokens, or a share of the budget.
  token_budget recent = token_budget::share(0.5);
  /// Last queries that score tokens, at least 1. If there are fewer, all of them.
  count_t window = all_queries;

  static constexpr const char* name = "h2o";
  static constexpr std::tuple options{
      option{"budget", &h2o::budget, "tokens that stay, the recent ones included"},
      option{"recent", &h2o::recent, "last tokens that always stay, or their share of the budget",
             option_range{0, 0, ">= 0 tokens, or a share of the budget in [0, 1]"}},
      option{"window", &h2o::window, "last queries that give scores", at_least_one}};

  /// Null, or the error that the budget is a share although the layer has scores: it would be a
  /// share of the tokens that the last step kept. O(1).
  template <attention_layer Layer>
  [[nodiscard]] constexpr const char* invalid(const Layer&) const noexcept {
    return carried<Layer> && budget.is_share()
               ? "budget must be a number of tokens while scores go on"
               : nullptr;
  }
  template <attention_layer Layer>
  [[nodiscard]] constexpr auto method(const Layer& layer) const noexcept {
    const index_t rows = carried<Layer> ? layer.window() : detail::most_rows(layer, window);
    return score_ranking<h2o>{rows, {.width = 1}, carried<Layer>, *this};
  }

  /// Returns the quota of a sequence of `tokens` tokens. O(1).
  [[nodiscard]] REFREEKV_HOST_DEVICE token_quota operator()(index_t tokens) const noexcept {
    const index_t most = budget.of(tokens);
    return token_quota::of(most, recent.of(most));
  }

 private:
  template <class Layer>
  static constexpr bool carried = requires(const Layer& layer) { layer.scores; };
};

}  // namespace refreekv::inline v0::policy
