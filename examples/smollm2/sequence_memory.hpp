// SPDX-License-Identifier: Apache-2.0
// What the forward pass needs of a sequence's keys and values, whatever they are kept in.
#pragma once

#include <cstddef>
#include <span>

namespace smollm2 {

// Rows of one KV head that lie one behind the other, values beside their keys.
struct kv_rows {
  const float* keys;    // [count, head_dim]
  const float* values;  // [count, head_dim]
  std::size_t count;
};

class layer_memory {
 public:
  virtual ~layer_memory() = default;

  virtual std::size_t kv_heads() const = 0;
  virtual std::size_t head_dim() const = 0;

  // Rows that attention sees, and those from one of them on that lie together, at least one.
  virtual std::size_t length(std::size_t kv_head) const = 0;
  virtual kv_rows rows_from(std::size_t kv_head, std::size_t row) const = 0;

  // Makes room for `tokens` more rows of every head, or for a few more than that.
  virtual void reserve(std::size_t tokens) = 0;

  // Adds rows to every head; keys and values are [token, kv_head, head_dim].
  virtual void append(std::span<const float> keys, std::span<const float> values) = 0;

 protected:
  layer_memory() = default;
  layer_memory(const layer_memory&) = default;
  layer_memory& operator=(const layer_memory&) = default;
};

class sequence_memory {
 public:
  virtual ~sequence_memory() = default;

  virtual layer_memory& layer(std::size_t index) = 0;

  // The position of the next token in the text, which rotary embeddings go on from. Dropping rows
  // does not change it.
  std::size_t next_position() const { return next_position_; }
  void advance(std::size_t tokens) { next_position_ += tokens; }

 protected:
  sequence_memory() = default;
  sequence_memory(const sequence_memory&) = default;
  sequence_memory& operator=(const sequence_memory&) = default;

 private:
  std::size_t next_position_ = 0;
};

}  // namespace smollm2
