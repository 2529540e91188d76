// SPDX-License-Identifier: Apache-2.0
// SnapKV (arXiv 2404.14469): keeps the tokens that the end of the prompt attends to, and their
// neighbours.
//
// A token's score is the attention that it receives from the last queries (the observation window),
// pooled over its neighbours. The window's own tokens stay. Of the other tokens, those with the
// highest scores stay, up to the budget.
//
// With `head_floor` below 1 the KV heads of a layer share their budgets: Ada-SnapKV (Ada-KV, arXiv
// 2407.11550). Let each of H heads have a budget of B tokens before the window. The H * B tokens
// with the highest scores of all heads are selected; among equals those of lower heads, then the
// earlier ones. Let `own` be the number of selected tokens of one head. That head keeps its best
// head_floor * B + (1 - head_floor) * own tokens.
//
// As in the authors' code (FFY0/AdaKV), this number is rounded, from halfway to the even one. So a
// layer keeps H * B tokens, up to half a token for each head. head_floor is that code's
// floor_alpha. There are two differences: head_floor * B is not rounded down before, and scores are
// not weighted by the share that B tokens hold of a head's scores (an option in that code).
#pragma once

#include "refreekv/policy/score_ranking.hpp"

namespace refreekv::inline v0::policy {

struct snapkv {
  template <class Memory>
  using decision = kept_positions<Memory>;

  /// Tokens of a KV head, those of the window included; the latter stay however small the budget
  /// is. If KV heads share their budgets, tokens of the mean KV head.
  token_budget budget = 2048;
  /// Number of last queries that score tokens, and of last tokens that always stay. At least 1. If
  /// there are fewer queries, all of them.
  count_t window = 32;
  pooling pool = {pool_kind::average, 5};
  /// Share of the budget that each KV head has for itself, in [0, 1]. 1: SnapKV. 0.2: Ada-SnapKV,
  /// with pool {max, 7}. A tensor parallel rank shares budgets only among its own heads. If a head
  /// is undecided, all heads keep all tokens of that sequence, and nothing is shared.
  double head_floor = 1;

  static constexpr const char* name = "snapkv";
  static constexpr std::tuple options{
      option{"budget", &snapkv::budget, "tokens that stay, those of the window included"},
      option{"window", &snapkv::window, "last queries that give scores, and last tokens that stay",
             at_least_one},
      option{"pool", &snapkv::pool, "how scores of neighbours are pooled"},
      option{"head_floor", &snapkv::head_floor, "share of the budget that is each KV head's own",
             any_share}};

  [[nodiscard]] constexpr auto method(const attention_layer auto& layer) const noexcept {
    return score_ranking<snapkv>{detail::most_rows(layer, window), pool, false, *this};
  }

  /// Returns the quota of a sequence of `tokens` tokens. O(1).
  [[nodiscard]] REFREEKV_HOST_DEVICE token_quota operator()(index_t tokens) const noexcept {
    return token_quota::of(budget.of(tokens), window);
  }
};

}  // namespace refreekv::inline v0::policy
