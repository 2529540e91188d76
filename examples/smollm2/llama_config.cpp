// SPDX-License-Identifier: Apache-2.0
// Metadata keys of the llama architecture, and the relations that must hold between them.
#include "llama_config.hpp"

#include <cstdint>
#include <stdexcept>
#include <string>

namespace smollm2 {
namespace {

// No real model comes near, and the product of two cannot overflow.
constexpr std::int64_t largest = 1 << 24;

std::size_t read_size(const gguf_file& file, const std::string& key) {
  const auto value = file.get<std::int64_t>(key);
  if (value <= 0 || value > largest) {
    throw std::runtime_error(file.path() + " has the impossible value " + std::to_string(value) +
                             " as " + key);
  }
  return static_cast<std::size_t>(value);
}

}  // namespace

llama_config read_llama_config(const gguf_file& file) {
  const auto architecture = file.get<std::string_view>("general.architecture");
  if (architecture != "llama") {
    throw std::runtime_error(file.path() + " holds a '" + std::string(architecture) +
                             "' model; this example runs 'llama'");
  }

  llama_config config{};
  config.layers = read_size(file, "llama.block_count");
  config.context = read_size(file, "llama.context_length");
  config.embedding = read_size(file, "llama.embedding_length");
  config.feed_forward = read_size(file, "llama.feed_forward_length");
  config.q_heads = read_size(file, "llama.attention.head_count");
  config.kv_heads = file.has("llama.attention.head_count_kv")
                        ? read_size(file, "llama.attention.head_count_kv")
                        : config.q_heads;
  config.head_dim = config.embedding / config.q_heads;
  config.rope_dims = file.has("llama.rope.dimension_count")
                         ? read_size(file, "llama.rope.dimension_count")
                         : config.head_dim;
  config.rope_base =
      file.has("llama.rope.freq_base") ? file.get<double>("llama.rope.freq_base") : 10000.0;
  config.norm_epsilon =
      static_cast<float>(file.get<double>("llama.attention.layer_norm_rms_epsilon"));
  const gguf_tensor& embedding = file.tensor("token_embd.weight");
  config.vocabulary = embedding.shape.size() == 2 ? embedding.shape[0] : 0;

  const bool possible =
      config.vocabulary > 0 && config.q_heads * config.head_dim == config.embedding &&
      config.q_heads % config.kv_heads == 0 && config.rope_dims % 2 == 0 &&
      config.rope_dims <= config.head_dim && config.rope_base > 0 && config.norm_epsilon >= 0;
  if (!possible) {
    throw std::runtime_error(file.path() + " has hyper-parameters that do not fit together");
  }
  return config;
}

}  // namespace smollm2
