// SPDX-License-Identifier: Apache-2.0
// Causal grouped-query attention of new tokens over the rows that each KV head still has.
#pragma once

#include <cstddef>
#include <span>

#include "sequence_memory.hpp"

namespace smollm2 {

// The keys and values of the new tokens are the last `tokens` rows of every head; of these a token
// sees its own and the earlier ones, of all older rows it sees each. Softmax scale:
// 1 / sqrt(head_dim). Query head h reads KV head h / (q_heads / kv_heads).
void attend(std::span<const float> queries,  // [token, q_head, head_dim], rotated
            std::size_t q_heads, const layer_memory& cache, int threads,
            std::span<float> output);  // [token, q_head, head_dim]

}  // namespace smollm2
