// SPDX-License-Identifier: Apache-2.0
// The model that the tests run, and its prompts.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "attention_tap.hpp"
#include "context.hpp"
#include "files.hpp"

// CTest reports exit code 77 as "skipped" (SKIP_RETURN_CODE).
inline std::string model_path() {
  const char* path = std::getenv("REFREEKV_MODEL");
  if (path == nullptr) {
    std::cerr << "REFREEKV_MODEL names no model file: skipped\n";
    std::exit(77);
  }
  return path;
}

inline const llama_cpp::model& loaded_model() {
  static const llama_cpp::model loaded(model_path());
  return loaded;
}

// Of a prompt that has more.
inline std::vector<llama_token> first_tokens(const std::string& prompt, std::size_t count) {
  auto tokens =
      loaded_model().encode_chat(smollm2::read_file(REFREEKV_PROMPTS_DIR "/" + prompt + ".txt"));
  tokens.resize(std::min(tokens.size(), count));
  return tokens;
}

// A prompt in the cache, and what its end attended to.
struct prefilled {
  llama_cpp::attention_tap tap;
  llama_cpp::context cache;
  std::vector<float> logits;

  prefilled(const llama_cpp::model& in, const llama_cpp::context_options& options,
            std::size_t cells, const std::vector<llama_token>& prompt, std::size_t window = 1,
            std::size_t first_layer = 2)
      : tap(window, first_layer), cache(in, options, cells, &tap) {
    logits = cache.prefill(prompt);
  }
  prefilled(const prefilled&) = delete;  // the cache knows where the tap is
};
