// SPDX-License-Identifier: Apache-2.0
// A model and its tokenizer, from one file.
#pragma once

#include <filesystem>

#include "llama.hpp"
#include "tokenizer.hpp"

namespace smollm2 {

struct loaded_model {
  llama network;
  tokenizer tokens;
};

inline loaded_model load_model(const std::filesystem::path& path, int threads) {
  const gguf_file file(path);
  return {llama(file, threads), tokenizer(file)};
}

}  // namespace smollm2
