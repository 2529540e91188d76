// SPDX-License-Identifier: Apache-2.0
#include "ggml/weights.hpp"

#include <gguf.h>

#include <initializer_list>
#include <stdexcept>

namespace ggml_engine {

std::size_t weights::bytes_read() const {
  std::size_t bytes = 0;
  for (ggml_tensor* each = ggml_get_first_tensor(memory.get()); each != nullptr;
       each = ggml_get_next_tensor(memory.get(), each)) {
    const std::string name = each->name;
    if (name.ends_with(".weight") && (each != embedding || each == output)) {
      bytes += ggml_nbytes(each);
    }
  }
  return bytes;
}

weights read_weights(const std::string& path, const smollm2::llama_config& config) {
  weights result{};
  ggml_context* memory = nullptr;
  const gguf_context_ptr file(gguf_init_from_file(path.c_str(), {/*no_alloc=*/false, &memory}));
  result.memory.reset(memory);
  if (file == nullptr) throw std::runtime_error("ggml cannot read " + path);

  int64_t tensors_read = 0;
  const auto tensor_of = [&](const std::string& name, std::size_t columns, std::size_t rows = 1) {
    ggml_tensor* tensor = ggml_get_tensor(memory, name.c_str());
    if (tensor == nullptr) throw std::runtime_error(path + " has no tensor '" + name + "'");
    if (tensor->ne[0] != static_cast<int64_t>(columns) ||
        ggml_nrows(tensor) != static_cast<int64_t>(rows)) {
      throw std::runtime_error("tensor '" + name + "' of " + path + " has an unexpected shape");
    }
    ++tensors_read;
    return tensor;
  };
  const std::size_t embedding = config.embedding, feed_forward = config.feed_forward;
  const std::size_t kv_size = config.kv_heads * config.head_dim;
  result.embedding = tensor_of("token_embd.weight", embedding, config.vocabulary);
  for (std::size_t i = 0; i < config.layers; ++i) {
    const std::string block = "blk." + std::to_string(i) + ".";
    result.layers.push_back(
        {.attention_norm = tensor_of(block + "attn_norm.weight", embedding),
         .query = tensor_of(block + "attn_q.weight", embedding, embedding),
         .key = tensor_of(block + "attn_k.weight", embedding, kv_size),
         .value = tensor_of(block + "attn_v.weight", embedding, kv_size),
         .attention_output = tensor_of(block + "attn_output.weight", embedding, embedding),
         .feed_norm = tensor_of(block + "ffn_norm.weight", embedding),
         .gate = tensor_of(block + "ffn_gate.weight", embedding, feed_forward),
         .up = tensor_of(block + "ffn_up.weight", embedding, feed_forward),
         .down = tensor_of(block + "ffn_down.weight", feed_forward, embedding)});
  }
  result.output_norm = tensor_of("output_norm.weight", embedding);
  const bool tied = ggml_get_tensor(memory, "output.weight") == nullptr;
  result.output =
      tied ? result.embedding : tensor_of("output.weight", embedding, config.vocabulary);
  if (tensors_read != gguf_get_n_tensors(file.get())) {
    throw std::runtime_error(path + " has tensors that this engine would ignore");
  }
  return result;
}

}  // namespace ggml_engine
