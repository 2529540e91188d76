// SPDX-License-Identifier: Apache-2.0
// Greedy decoding with any engine, and how far two of its caches are apart.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "divergence.hpp"

namespace smollm2 {

// Appends a token to a cache and returns the logits of what follows it, [vocabulary].
using decode_step = std::function<std::vector<float>(int token)>;

struct generation {
  std::vector<int> tokens;
  std::vector<std::vector<float>> logits;  // [token] of [vocabulary]: what each was chosen from
  double seconds;                          // of decoding; tokens - 1 steps
};

// The most likely token again and again, from the logits that end the prefill. Stops after
// `count` tokens, or at `end_token` (not included; -1 for never).
generation generate(const decode_step& decode, std::vector<float> logits, std::size_t count,
                    int end_token);

// Feeds the tokens that the full cache generated to the pruned one and compares the distributions
// at each. Both start from the same logits: a prefill is computed with the full cache.
comparison compare(const generation& full, const decode_step& pruned);

}  // namespace smollm2
