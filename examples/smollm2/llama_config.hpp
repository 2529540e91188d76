// SPDX-License-Identifier: Apache-2.0
// The hyper-parameters of a Llama model, read from GGUF metadata.
#pragma once

#include <cstddef>

#include "gguf.hpp"

namespace smollm2 {

struct llama_config {
  std::size_t layers;
  std::size_t context;       // tokens that the model was trained for
  std::size_t embedding;     // elements of a hidden state
  std::size_t feed_forward;  // elements between the two halves of the feed-forward network
  std::size_t q_heads;
  std::size_t kv_heads;
  std::size_t head_dim;
  std::size_t rope_dims;  // of head_dim
  std::size_t vocabulary;
  double rope_base;
  float norm_epsilon;
};

// Throws std::runtime_error where the file holds another architecture or impossible numbers.
llama_config read_llama_config(const gguf_file& file);

}  // namespace smollm2
