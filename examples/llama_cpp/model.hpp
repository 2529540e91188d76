// SPDX-License-Identifier: Apache-2.0
// A model in llama.cpp, with its tokenizer and chat template.
#pragma once

#include <llama.h>

#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace llama_cpp {

class model {
 public:
  // Throws std::runtime_error where llama.cpp cannot load it, or where a hole in its cache is not
  // what the library decides about: recurrent layers, sliding windows with cells of their own.
  explicit model(const std::filesystem::path& path);

  llama_model* get() const { return model_.get(); }
  std::size_t layers() const { return static_cast<std::size_t>(llama_model_n_layer(get())); }
  std::size_t bytes() const { return llama_model_size(get()); }  // of its tensors
  std::size_t longest_context() const;

  // The prompt as a user's message in the model's chat template.
  std::vector<llama_token> encode_chat(const std::string& prompt) const;
  std::string decode(std::span<const llama_token> tokens) const;
  llama_token end_token() const;  // of an answer
  std::size_t vocabulary_size() const;

 private:
  const llama_vocab* vocabulary() const { return llama_model_get_vocab(get()); }

  struct free_model {
    void operator()(llama_model* m) const { llama_model_free(m); }
  };
  std::unique_ptr<llama_model, free_model> model_;
};

}  // namespace llama_cpp
