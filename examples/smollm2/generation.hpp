// SPDX-License-Identifier: Apache-2.0
// Greedy decoding, and how far a pruned cache's predictions are from the full one's.
#pragma once

#include <vector>

#include "divergence.hpp"
#include "llama.hpp"

namespace smollm2 {

struct generation {
  std::vector<int> tokens;
  std::vector<std::vector<float>> logits;  // [token] of [vocabulary]: what each was chosen from
  double seconds;                          // of decoding; tokens - 1 steps
};

// The most likely token again and again, from the logits that end the prefill. Stops after
// `count` tokens, at `end_token` (not included; -1 for never), or when the model's context is full.
generation generate(const llama& model, std::vector<float> logits, kv_cache& cache,
                    std::size_t count, int end_token);

struct comparison : divergence {
  double full_tokens_per_second;
};

// Feeds the tokens that the full cache generated to the pruned one and compares the distributions
// at each. Both start from the same logits: a prefill is computed with the full cache.
comparison compare(const llama& model, const generation& full, kv_cache& pruned);

}  // namespace smollm2
