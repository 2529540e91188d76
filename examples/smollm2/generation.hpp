// SPDX-License-Identifier: Apache-2.0
// Greedy decoding with this engine, and how far a pruned cache is from the full one.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "greedy.hpp"
#include "llama.hpp"

namespace smollm2 {

// As greedy.hpp's; also stops when the model's context is full. `decode` appends to the cache.
generation generate(const llama& model, std::vector<float> logits, kv_cache& cache,
                    std::size_t count, int end_token, const decode_step& decode);
// The same with the model's own decode.
generation generate(const llama& model, std::vector<float> logits, kv_cache& cache,
                    std::size_t count, int end_token);

// Appends tokens to a cache and returns the logits after each, [token] of [vocabulary].
using score_step = std::function<std::vector<std::vector<float>>(std::span<const int> tokens)>;

// As greedy.hpp's, but the pruned cache takes all tokens in one call. logits: [vocabulary], those
// that the prompt ends with; on a cache that was pruned before they are its own.
comparison compare(const generation& full, std::vector<float> logits, const score_step& score);

}  // namespace smollm2
