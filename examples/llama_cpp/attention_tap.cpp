// SPDX-License-Identifier: Apache-2.0
#include "attention_tap.hpp"

#include <cstdio>
#include <cstring>
#include <exception>
#include <optional>
#include <stdexcept>

namespace llama_cpp {

namespace {

std::size_t extent(const ggml_tensor& tensor, int axis) {
  return static_cast<std::size_t>(tensor.ne[axis]);
}

float float_param(const ggml_tensor& node, int index) {
  float value;
  std::memcpy(&value, node.op_params + index, sizeof value);
  return value;
}

// The tensor that lies under views and copies: f32 keys are copied to f16 for flash attention.
const ggml_tensor& source_of(const ggml_tensor& tensor) {
  if (tensor.view_src != nullptr) return *tensor.view_src;
  return tensor.op == GGML_OP_CPY ? source_of(*tensor.src[0]) : tensor;
}

// The number that ends the name, if that begins as `format`, which has a %d in its place, does.
std::optional<std::size_t> layer_in(const ggml_tensor& tensor, const char* format) {
  int layer;
  if (std::sscanf(tensor.name, format, &layer) != 1 || layer < 0) return std::nullopt;
  return static_cast<std::size_t>(layer);
}

// The layer whose attention the node is, if it is one's.
std::optional<std::size_t> attention_layer(const ggml_tensor& node) {
  if (node.op == GGML_OP_SOFT_MAX) return layer_in(node, "kq_soft_max-%d");
  if (node.op != GGML_OP_FLASH_ATTN_EXT) return std::nullopt;
  return layer_in(source_of(*node.src[1]), "cache_k_l%d");
}

// Whether the node writes keys or values of new tokens to the cache.
bool fills_cache(const ggml_tensor& node) {
  return node.op == GGML_OP_SET_ROWS &&
         (layer_in(source_of(node), "cache_k_l%d") || layer_in(source_of(node), "cache_v_l%d"));
}

}  // namespace

void attention_tap::watch(std::size_t tokens) {
  *this = attention_tap(window_, first_layer_);
  tokens_ = tokens;
  watching_ = true;
}

void attention_tap::finish() {
  watching_ = false;
  if (!error_.empty()) throw std::runtime_error(error_);
}

bool attention_tap::on_node(ggml_tensor* node, bool ask, void* tap) noexcept {
  auto& self = *static_cast<attention_tap*>(tap);
  if (!self.watching_) return false;
  try {
    if (ask) {
      if (fills_cache(*node)) self.cache_bytes_ += ggml_nbytes(&source_of(*node));
      const auto layer = attention_layer(*node);
      return layer && *layer >= self.first_layer_;
    }
    if (node->op == GGML_OP_SOFT_MAX) {
      self.see_softmax(*node);
    } else {
      self.see_flash_attention(*node);
    }
  } catch (const std::exception& error) {  // which must not pass through llama.cpp
    self.error_ = error.what();
  }
  return true;
}

void attention_tap::see_flash_attention(const ggml_tensor& node) {
  if (float_param(node, 1) > 0 || node.src[4] != nullptr) {
    throw std::runtime_error(
        "the model has ALiBi or learned sinks, which only rows show: turn flash attention off");
  }
  const ggml_tensor& queries = *node.src[0];  // [head_dim, token, q_head]
  const ggml_tensor& keys = *node.src[1];     // [head_dim, cell, kv_head]
  add_layer({extent(queries, 2), extent(keys, 2), extent(keys, 0), float_param(node, 0),
             float_param(node, 2)});
  append_rows(queries, shape_.head_dim, queries_);
  keys_.push_back(&source_of(keys));
}

void attention_tap::see_softmax(const ggml_tensor& node) {  // [cell, token, q_head]
  add_layer({.q_heads = extent(node, 2)});
  append_rows(node, tokens_, attention_);  // past them the cells are empty
}

void attention_tap::add_layer(const attention_shape& shape) {
  if (layers_ > 0 && shape != shape_)
    throw std::runtime_error("the model's layers differ in heads");
  shape_ = shape;
  ++layers_;
}

void attention_tap::append_rows(const ggml_tensor& tensor, std::size_t length,
                                std::vector<float>& to) const {
  const std::size_t first = extent(tensor, 1) - rows();
  for (std::size_t row = first; row < extent(tensor, 1); ++row) {
    for (std::size_t head = 0; head < shape_.q_heads; ++head) {
      to.resize(to.size() + length);
      ggml_backend_tensor_get(&tensor, to.data() + to.size() - length,
                              row * tensor.nb[1] + head * tensor.nb[2], length * sizeof(float));
    }
  }
}

}  // namespace llama_cpp
