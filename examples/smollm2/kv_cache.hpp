// SPDX-License-Identifier: Apache-2.0
// The key/value cache of one sequence: per layer, one block of rows for each KV head.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include "pages.hpp"
#include "sequence_memory.hpp"

namespace smollm2 {

// Every KV head has its own contiguous block in the layer's two buffers, [kv_head][slot, head_dim],
// of its own length: the heads of a layer may keep different numbers of tokens.
class layer_cache : public layer_memory {
 public:
  layer_cache(std::size_t kv_heads, std::size_t head_dim);
  layer_cache(const layer_cache& other);
  layer_cache& operator=(const layer_cache& other);
  layer_cache(layer_cache&&) noexcept = default;
  layer_cache& operator=(layer_cache&&) noexcept = default;
  ~layer_cache() override = default;

  std::size_t kv_heads() const override { return blocks_.size(); }
  std::size_t head_dim() const override { return head_dim_; }
  std::size_t length(std::size_t kv_head) const override { return blocks_[kv_head].length; }
  std::size_t capacity(std::size_t kv_head) const { return blocks_[kv_head].capacity; }

  float* keys(std::size_t kv_head);                // [slot, head_dim]
  float* values(std::size_t kv_head);              // [slot, head_dim]
  const float* keys(std::size_t kv_head) const;    // [slot, head_dim]
  const float* values(std::size_t kv_head) const;  // [slot, head_dim]

  kv_rows rows_from(std::size_t kv_head, std::size_t row) const override;

  // Elements from one head's block to the next where all heads have the same capacity: then
  // keys(0) and values(0) are dense tensors [kv_head, capacity, head_dim]. Otherwise nothing.
  std::optional<std::size_t> head_stride() const;

  // Memory taken from the operating system, in whole pages.
  std::size_t bytes() const { return keys_.bytes().size() + values_.bytes().size(); }

  void reserve(std::size_t tokens) override;
  void append(std::span<const float> keys, std::span<const float> values) override;

  // Keeps the slots [first_slot, first_slot + length) of each head, as slots [0, length) of fresh
  // buffers that have room for nothing else; the old buffers go back to the operating system.
  void retain(std::span<const std::size_t> first_slot,  // [kv_head]
              std::span<const std::size_t> length);     // [kv_head]

 private:
  struct block {
    std::size_t first_row;  // in the buffers
    std::size_t capacity;   // rows
    std::size_t length;     // rows in use, from first_row on
  };

  // Moves the rows in use into fresh buffers with the given capacities.
  void resize(std::span<const std::size_t> capacity);  // [kv_head]

  std::size_t head_dim_;
  std::vector<block> blocks_;  // [kv_head]
  pages keys_;
  pages values_;
};

class kv_cache : public sequence_memory {
 public:
  kv_cache(std::size_t layers, std::size_t kv_heads, std::size_t head_dim)
      : layers_(layers, layer_cache(kv_heads, head_dim)) {}

  std::size_t layers() const { return layers_.size(); }
  layer_cache& layer(std::size_t index) override { return layers_[index]; }
  const layer_cache& layer(std::size_t index) const { return layers_[index]; }

  std::size_t bytes() const;

 private:
  std::vector<layer_cache> layers_;
};

}  // namespace smollm2
