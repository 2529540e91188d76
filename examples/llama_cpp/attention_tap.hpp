// SPDX-License-Identifier: Apache-2.0
// An evaluation callback of llama.cpp that keeps what the last tokens of a prompt attend to.
#pragma once

#include <ggml-backend.h>

#include <algorithm>
#include <string>
#include <vector>

namespace llama_cpp {

// Idle, it costs nothing that can be measured. On, it stops the computation at each layer's
// attention. What it keeps depends on the context:
// - with flash attention the queries, as they meet the keys in the cache, which stay where they
// are;
//   of quantised keys both carry a rotation, so no other query would do.
// - without, the rows after the softmax: 4 bytes for each layer, query head, row and token.
class attention_tap {
 public:
  // Looks at the last `window` tokens, in layers from `first_layer` on.
  attention_tap(std::size_t window, std::size_t first_layer)
      : window_(window), first_layer_(first_layer) {}

  std::size_t window() const { return window_; }
  std::size_t first_layer() const { return first_layer_; }

  // The next batch ends a prompt of `tokens` tokens and holds all that the window looks at.
  void watch(std::size_t tokens);
  // Back to idle. Throws std::runtime_error where a layer attends in a way that it cannot show.
  void finish();

  // What it saw, of a prompt of tokens() tokens in a context that holds nothing else: token t is in
  // cell t.
  std::size_t tokens() const { return tokens_; }
  std::size_t layers() const { return layers_; }
  std::size_t rows() const { return std::min(window_, tokens_); }
  std::size_t q_heads() const { return shape_.q_heads; }
  const std::vector<float>& attention() const { return attention_; }  // [layer, row, q_head, token]

  // The same with flash attention.
  std::size_t kv_heads() const { return shape_.kv_heads; }
  std::size_t head_dim() const { return shape_.head_dim; }
  float scale() const { return shape_.scale; }
  float soft_cap() const { return shape_.soft_cap; }
  const std::vector<float>& queries() const { return queries_; }  // [layer, row, q_head, head_dim]
  // [layer]: the cache's own tensors, of which a row is a cell, with the keys of all its heads.
  const std::vector<const ggml_tensor*>& keys() const { return keys_; }

  // Keys and values of all layers, as allocated.
  std::size_t cache_bytes() const { return cache_bytes_; }

  static bool on_node(ggml_tensor* node, bool ask, void* tap) noexcept;

 private:
  struct attention_shape {
    std::size_t q_heads = 0, kv_heads = 0, head_dim = 0;
    float scale = 0, soft_cap = 0;

    friend bool operator==(const attention_shape&, const attention_shape&) = default;
  };

  void see_flash_attention(const ggml_tensor& node);
  void see_softmax(const ggml_tensor& node);
  void add_layer(const attention_shape& shape);
  // Appends a row of `tensor` for each of the last rows() tokens and each head.
  void append_rows(const ggml_tensor& tensor, std::size_t length, std::vector<float>& to) const;

  std::size_t window_;
  std::size_t first_layer_;
  bool watching_ = false;
  std::string error_;

  std::size_t tokens_ = 0;
  std::size_t layers_ = 0;
  std::size_t cache_bytes_ = 0;
  attention_shape shape_;
  std::vector<float> attention_;
  std::vector<float> queries_;
  std::vector<const ggml_tensor*> keys_;
};

}  // namespace llama_cpp
