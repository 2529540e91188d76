// SPDX-License-Identifier: Apache-2.0
// The budget of a policy: a number of tokens, or a share of the prompt.
#pragma once

#include <cmath>
#include <concepts>

#include "refreekv/core/config.hpp"

namespace refreekv::inline v0 {

/// The window that uses every query of the layer.
inline constexpr count_t all_queries = max_count;

/// A budget in tokens, or a share of a sequence's tokens. `.budget = 2048` is 2048 tokens;
/// `.budget = token_budget::share(0.5)` is half of the sequence.
class token_budget {
 public:
  template <std::integral Integer>
  constexpr token_budget(Integer tokens) noexcept : tokens_(static_cast<index_t>(tokens)) {}
  token_budget(std::floating_point auto) = delete;  // share(0.5) is meant

  /// Returns the budget that is this fraction of a sequence's tokens. fraction: in [0, 1].
  [[nodiscard]] static constexpr token_budget share(double fraction) noexcept {
    token_budget budget(0);
    budget.is_share_ = true;
    budget.share_ = fraction;
    return budget;
  }

  /// Returns the budget, in tokens, of a sequence of `tokens` tokens; it may be more than `tokens`.
  /// A share is rounded to the nearest number, from halfway to the even one, as in the released
  /// code of arXiv 2502.16886. A share above 0 is at least one token. O(1).
  [[nodiscard]] REFREEKV_HOST_DEVICE index_t of(index_t tokens) const noexcept {
    if (!is_share_) return tokens_;
    const auto rounded = static_cast<index_t>(std::rint(share_ * static_cast<double>(tokens)));
    return rounded == 0 && share_ > 0 && tokens > 0 ? 1 : rounded;
  }

  [[nodiscard]] constexpr bool is_share() const noexcept { return is_share_; }
  /// Returns the share, or the number of tokens: a budget as bindings show it.
  [[nodiscard]] constexpr double amount() const noexcept {
    return is_share_ ? share_ : static_cast<double>(tokens_);
  }
  [[nodiscard]] constexpr bool valid() const noexcept {
    return is_share_ ? share_ >= 0 && share_ <= 1 : tokens_ >= 0 && tokens_ <= max_count;
  }

 private:
  index_t tokens_;
  bool is_share_ = false;
  double share_ = 0;
};

}  // namespace refreekv::inline v0
