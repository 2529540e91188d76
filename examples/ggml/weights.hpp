// SPDX-License-Identifier: Apache-2.0
// The weights of a Llama model as its file has them, quantised: tensors of ggml's.
#pragma once

#include <ggml-cpp.h>

#include <string>
#include <vector>

#include "llama_config.hpp"

namespace ggml_engine {

struct layer_weights {
  ggml_tensor *attention_norm, *query, *key, *value, *attention_output;
  ggml_tensor *feed_norm, *gate, *up, *down;
};

struct weights {
  ggml_context_ptr memory;
  ggml_tensor* embedding;
  std::vector<layer_weights> layers;
  ggml_tensor* output_norm;
  ggml_tensor* output;  // the embedding where the file has no other

  // All that decoding a token reads: everything but an embedding that does not serve as both.
  std::size_t bytes_read() const;
};

// Throws std::runtime_error where a tensor is missing, is not of the expected shape, or is one that
// this engine would ignore.
weights read_weights(const std::string& path, const smollm2::llama_config& config);

}  // namespace ggml_engine
