// SPDX-License-Identifier: Apache-2.0
// The forward pass of a Llama model on ggml, with a hook that may prune each layer's cache.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <vector>

#include "ggml/layer_cache.hpp"
#include "ggml/weights.hpp"
#include "gguf.hpp"

namespace ggml_engine {

struct kv_cache {
  std::vector<layer_cache> layers;
  // The position of the next token in the text. Dropping slots does not change it.
  std::size_t next_position = 0;

  kv_cache copy() const;
  std::size_t bytes_in_use() const;
};

struct prefill_hooks {
  // How many of the last tokens on_layer gets the queries of.
  std::size_t window = 1;

  // Called once a layer's cache holds the whole prompt, and before the next layer's does. Queries
  // are rotated, [min(window, tokens), q_head, head_dim]. The hook may shrink the layer.
  std::function<void(std::size_t layer, std::span<const float> queries, layer_cache& cache)>
      on_layer = {};

  // From just above 0 to 1.
  std::function<void(double fraction)> on_progress = {};
};

class llama {
 public:
  llama(const smollm2::gguf_file& file, int threads);

  const smollm2::llama_config& config() const { return config_; }
  std::size_t weight_bytes() const { return weights_.bytes_read(); }  // that decoding a token reads

  kv_cache new_cache() const;

  // Appends the tokens to the cache and returns the logits of the last one, [vocabulary]. Throws
  // std::runtime_error where the tokens are none or do not fit into the model's context.
  std::vector<float> prefill(std::span<const int> tokens, kv_cache& cache,
                             const prefill_hooks& hooks = {});

  // The same for one token: one graph for all layers, each as long as it is.
  std::vector<float> decode(int token, kv_cache& cache);

 private:
  struct graph;

  void require_room(std::size_t tokens, const kv_cache& cache) const;

  smollm2::llama_config config_;
  weights weights_;
  ggml_backend_ptr backend_;
  ggml_gallocr_ptr activations_;
};

}  // namespace ggml_engine
