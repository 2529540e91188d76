// SPDX-License-Identifier: Apache-2.0
// SnapKV (arXiv 2404.14469): the tokens that the end of the prompt attends to, and their
// neighbours.
//
// A token's score is the attention that it receives from the last queries, the observation window,
// pooled over its neighbours. The window's own tokens stay, and of the others those with the
// highest scores, up to the budget.
#pragma once

#include "refreekv/score_ranking.hpp"

namespace refreekv::inline v0::policy {

struct snapkv {
  template <class Memory>
  using decision = kept_positions<Memory>;

  /// Tokens, the window's included: those stay however small the budget is.
  token_budget budget = 2048;
  /// Last queries that give scores, all there are if fewer, and last tokens, which stay; at
  /// least 1.
  count_t window = 32;
  pooling pool = {pool_kind::average, 5};

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (!budget.valid()) return "budget must be >= 0 tokens, or a share in [0, 1]";
    if (window < 1 || window > max_count) return "window must be >= 1";
    if (!pool.valid()) return "pool.width must be odd";
    return nullptr;
  }
  [[nodiscard]] constexpr const char* invalid(const attention_observation auto&) const noexcept {
    return nullptr;
  }
  [[nodiscard]] constexpr auto method(const attention_observation auto& seen) const noexcept {
    return score_ranking<snapkv>{detail::most_rows(seen, window), pool, false, *this};
  }

  /// What stays of a sequence. O(1)
  [[nodiscard]] REFREEKV_HOST_DEVICE token_quota operator()(index_t tokens) const noexcept {
    return token_quota::of(budget.of(tokens), window);
  }
};

}  // namespace refreekv::inline v0::policy
