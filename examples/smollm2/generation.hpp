// SPDX-License-Identifier: Apache-2.0
// Greedy decoding with this engine, and how far a pruned cache is from the full one.
#pragma once

#include <vector>

#include "greedy.hpp"
#include "llama.hpp"

namespace smollm2 {

// As greedy.hpp's; also stops when the model's context is full.
generation generate(const llama& model, std::vector<float> logits, kv_cache& cache,
                    std::size_t count, int end_token);

// As greedy.hpp's, but the pruned cache takes all tokens in one pass. logits: [vocabulary], those
// that the prompt ends with; on a cache that was pruned before they are its own.
comparison compare(const llama& model, const generation& full, std::vector<float> logits,
                   kv_cache& pruned);

}  // namespace smollm2
