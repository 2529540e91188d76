// SPDX-License-Identifier: Apache-2.0
// How far the distributions that two caches predict are apart.
#pragma once

#include <span>
#include <vector>

namespace smollm2 {

using logits_view = std::span<const std::vector<float>>;  // [token] of [vocabulary]

struct divergence {
  double mean_kl;         // nats: KL(full || pruned), mean over the tokens
  double largest_kl;      // of any token
  double same_top_token;  // share of the tokens, in [0, 1]
};

struct comparison : divergence {
  double full_tokens_per_second;
};

int top_token(std::span<const float> logits);

// Requires as many of the one as of the other, and at least one.
divergence compare_logits(logits_view full, logits_view pruned);

}  // namespace smollm2
