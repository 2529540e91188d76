// SPDX-License-Identifier: Apache-2.0
// One sequence in a llama.cpp context: its cells, and what can be done with them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "model.hpp"

namespace llama_cpp {

class attention_tap;

struct context_options {
  ggml_type keys = GGML_TYPE_F16;
  ggml_type values = GGML_TYPE_F16;
  bool flash_attention = true;
  int threads = 1;
};

class context {
 public:
  // cells: tokens that it has room for; llama.cpp rounds them up to a multiple of 256. `tap` sees
  // what is computed and must outlive the context. Throws std::runtime_error where llama.cpp
  // refuses, quantised values without flash attention for example.
  context(const model& in, const context_options& options, std::size_t cells,
          attention_tap* tap = nullptr);

  const model& in() const { return *model_; }
  const context_options& options() const { return options_; }
  std::size_t cells() const { return llama_n_ctx(get()); }
  llama_pos next_position() const { return llama_memory_seq_pos_max(memory(), 0) + 1; }

  // The logits after the last of the prompt's tokens, of which the tap sees the end. Throws as
  // decode does, and where the tap cannot show what it should.
  std::vector<float> prefill(std::span<const llama_token> prompt);

  // The logits after the last of the tokens, which get the next positions. Throws
  // std::runtime_error where there is no room for them.
  std::vector<float> decode(std::span<const llama_token> tokens);

  // Frees the cells of positions [first, last), to the end where last is -1; all other tokens keep
  // their position. The cells' memory stays where it is; the fused kernel of the CPU skips them,
  // and without flash attention they cost as much as before.
  void remove(llama_pos first, llama_pos last);

  // What the sequence holds, cell by cell, and the same in a context of the same options.
  std::vector<std::uint8_t> save() const;
  std::size_t saved_bytes() const { return llama_state_seq_get_size(get(), 0); }
  void restore(std::span<const std::uint8_t> saved);

 private:
  llama_context* get() const { return context_.get(); }
  llama_memory_t memory() const { return llama_get_memory(get()); }

  struct free_context {
    void operator()(llama_context* c) const { llama_free(c); }
  };
  const model* model_;
  context_options options_;
  attention_tap* tap_;
  std::unique_ptr<llama_context, free_context> context_;
};

// The sequence in a context of its own with room for `cells` tokens: a context does not shrink, and
// what is saved has no holes. The old context is gone, before the new one is there.
context shrink(context old, std::size_t cells);

}  // namespace llama_cpp
