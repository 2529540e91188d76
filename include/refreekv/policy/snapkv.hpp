// SPDX-License-Identifier: Apache-2.0
// SnapKV (arXiv 2404.14469): the tokens that the end of the prompt attends to, and their
// neighbours.
//
// A token's score is the attention that it receives from the last queries, the observation window,
// pooled over its neighbours. The window's own tokens stay, and of the others those with the
// highest scores, up to the budget.
//
// With `head_floor` below 1 the KV heads of a layer share their budgets: Ada-SnapKV (Ada-KV, arXiv
// 2407.11550). Say that each of H heads may keep B tokens before the window, and take the H * B
// with the highest scores of all heads, those of lower heads and then the earlier ones among
// equals. A head keeps head_floor * B + (1 - head_floor) * (how many of these are its own) tokens,
// its best ones. As in the authors' code (FFY0/AdaKV), whose floor_alpha the floor is, that is
// rounded, to even from halfway, so that a layer keeps H * B up to half a token a head. Unlike
// there, head_floor * B is not cut to a whole number before; and scores are not weighted by what
// share of a head's B of them hold, which is an option there.
#pragma once

#include "refreekv/policy/score_ranking.hpp"

namespace refreekv::inline v0::policy {

struct snapkv {
  template <class Memory>
  using decision = kept_positions<Memory>;

  /// Tokens, the window's included: those stay however small the budget is. Of the mean KV head
  /// where these share them.
  token_budget budget = 2048;
  /// Last queries that give scores, all there are if fewer, and last tokens, which stay; at
  /// least 1.
  count_t window = 32;
  pooling pool = {pool_kind::average, 5};
  /// Share of the budget that is every KV head's own, in [0, 1]. 1: SnapKV. 0.2: Ada-SnapKV, with
  /// pool {max, 7}. A rank with a part of a layer's heads shares among these. Where a head has
  /// nothing to decide on, all keep all of its sequence, and nothing is shared.
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

  /// What stays of a sequence. O(1)
  [[nodiscard]] REFREEKV_HOST_DEVICE token_quota operator()(index_t tokens) const noexcept {
    return token_quota::of(budget.of(tokens), window);
  }
};

}  // namespace refreekv::inline v0::policy
