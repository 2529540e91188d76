// SPDX-License-Identifier: Apache-2.0
// H2O (arXiv 2306.14048): the tokens that received the most attention so far, and recent ones.
//
// After a prefill a token's score is the attention that it received from the rows of the window: of
// all queries in the paper, of the last 8 in the code that arXiv 2502.16886 compares with. While
// decoding, each step adds its row to scores that the caller keeps and evicts what is over budget.
#pragma once

#include "refreekv/policy/score_ranking.hpp"

namespace refreekv::inline v0::policy {

/// To decode, observe with_scores(observe(queries, keys), scores): what all rows of the observation
/// give is added to scores [sequence, kv_head, capacity] in place. The rows' own tokens are new and
/// start at 0 (where info.rows.ends says what rows see, the caller sets new tokens to 0); all older
/// ones need a score, so a prompt's scores are 0 before its last rows alone are passed. Compact
/// them with the cache, as a source of head_dim 1. Sliding windows and ALiBi need an unpruned cache
/// (see attention_params).
struct h2o {
  template <class Memory>
  using decision = kept_positions<Memory>;

  token_budget budget = 2048;  ///< tokens, the recent ones included
  /// Last tokens, which stay whatever the budget is: a number, or a share of the budget.
  token_budget recent = token_budget::share(0.5);
  count_t window =
      all_queries;  ///< last queries that give scores, at least 1; all there are if fewer

  static constexpr const char* name = "h2o";
  static constexpr std::tuple options{
      option{"budget", &h2o::budget, "tokens that stay, the recent ones included"},
      option{"recent", &h2o::recent, "last tokens that always stay, or their share of the budget",
             option_range{0, 0, ">= 0 tokens, or a share of the budget in [0, 1]"}},
      option{"window", &h2o::window, "last queries that give scores", at_least_one}};

  /// With scores a share would be one of what the last step left.
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

  /// What stays of a sequence. O(1)
  [[nodiscard]] REFREEKV_HOST_DEVICE token_quota operator()(index_t tokens) const noexcept {
    const index_t most = budget.of(tokens);
    return token_quota::of(most, recent.of(most));
  }

 private:
  template <class Layer>
  static constexpr bool carried = requires(const Layer& layer) { layer.scores; };
};

}  // namespace refreekv::inline v0::policy
