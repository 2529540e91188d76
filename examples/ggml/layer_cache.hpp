// SPDX-License-Identifier: Apache-2.0
// One layer's keys and values: two f16 tensors that are as long as this layer needs them to be.
#pragma once

#include <ggml-cpp.h>

#include <cstddef>

#include "pages.hpp"
#include "policy_runner.hpp"

namespace ggml_engine {

class layer_cache {
 public:
  // A row holds what all KV heads of one token have.
  explicit layer_cache(std::size_t row_elements) : row_elements_(row_elements) {}
  layer_cache(layer_cache&&) noexcept = default;
  layer_cache& operator=(layer_cache&&) noexcept = default;

  layer_cache copy() const;

  // [slot, kv_head, head_dim], with room for more slots than length(). Null before the first
  // reserve.
  ggml_tensor* keys() const { return keys_.tensor; }
  ggml_tensor* values() const { return values_.tensor; }

  std::size_t length() const { return length_; }
  std::size_t bytes_in_use() const { return 2 * length_ * row_bytes(); }
  // Memory taken from the operating system, in whole pages.
  std::size_t bytes() const { return keys_.memory.bytes().size() + values_.memory.bytes().size(); }

  // Makes room for `tokens` more slots, and for a few more than that.
  void reserve(std::size_t tokens);
  // The next `tokens` slots have been written.
  void advance(std::size_t tokens) { length_ += tokens; }
  // Keeps these slots only, in fresh memory; the old one goes back to the operating system.
  void retain(smollm2::slot_range slots);

  // Attention passes over these slots, which stay: what a mask does in place of pruning.
  void hide(smollm2::slot_range slots) { hidden_ = slots; }
  bool hides() const { return hidden_.length > 0; }
  bool hides(std::size_t slot) const { return slot - hidden_.first < hidden_.length; }

 private:
  // What a tensor is made of; moved as a whole.
  struct storage {
    smollm2::pages memory;
    ggml_backend_buffer_ptr buffer;  // a view of the memory
    ggml_context_ptr context;
    ggml_tensor* tensor = nullptr;
  };

  std::size_t row_bytes() const { return row_elements_ * sizeof(ggml_fp16_t); }
  storage allocate(std::size_t slots) const;
  // Fresh memory with the given slots and room for `room` more.
  void move(smollm2::slot_range slots, std::size_t room);

  std::size_t row_elements_;
  std::size_t length_ = 0;
  std::size_t capacity_ = 0;
  storage keys_, values_;
  smollm2::slot_range hidden_{};
};

}  // namespace ggml_engine
