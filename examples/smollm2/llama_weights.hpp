// SPDX-License-Identifier: Apache-2.0
// The weights of a Llama model, dequantised to float32.
#pragma once

#include <optional>
#include <vector>

#include "gguf.hpp"
#include "llama_config.hpp"
#include "matrix.hpp"

namespace smollm2 {

struct llama_layer {
  row_vector attention_norm;  // [embedding]
  matrix query;               // [q_head * head_dim, embedding]
  matrix key;                 // [kv_head * head_dim, embedding]
  matrix value;               // [kv_head * head_dim, embedding]
  matrix attention_output;    // [embedding, q_head * head_dim]
  row_vector feed_norm;       // [embedding]
  matrix gate;                // [feed_forward, embedding]
  matrix up;                  // [feed_forward, embedding]
  matrix down;                // [embedding, feed_forward]
};

struct llama_weights {
  matrix embedding;  // [vocabulary, embedding]
  std::vector<llama_layer> layers;
  row_vector output_norm;        // [embedding]
  std::optional<matrix> output;  // [vocabulary, embedding]; nothing: the embedding serves as both

  const matrix& logits() const { return output ? *output : embedding; }

  // All that decoding a token reads: everything but an embedding that does not serve as both.
  std::size_t bytes_read() const;
};

// Throws std::runtime_error where a tensor is missing, is not of the expected shape, or is one that
// this example would ignore.
llama_weights read_llama_weights(const gguf_file& file, const llama_config& config);

}  // namespace smollm2
