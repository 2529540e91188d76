// SPDX-License-Identifier: Apache-2.0
// Names and shapes of the tensors of the llama architecture.
#include "llama_weights.hpp"

#include <set>
#include <stdexcept>
#include <string>
#include <string_view>

#include "dequantize.hpp"
#include "pages.hpp"

namespace smollm2 {
namespace {

std::string text_of(std::span<const std::size_t> shape) {
  std::string text = "[";
  for (const std::size_t extent : shape) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(extent);
  }
  return text + "]";
}

class weight_reader {
 public:
  explicit weight_reader(const gguf_file& file) : file_(file) {}

  matrix matrix_of(const std::string& name, std::size_t rows, std::size_t columns) {
    const gguf_tensor& tensor = take(name, {rows, columns});
    matrix values(index(rows), index(columns));
    decode(tensor, {values.data(), tensor.elements()});
    return values;
  }

  row_vector vector_of(const std::string& name, std::size_t size) {
    const gguf_tensor& tensor = take(name, {size});
    row_vector values(index(size));
    decode(tensor, {values.data(), tensor.elements()});
    return values;
  }

  // A bias or a table of rotary frequencies that went unnoticed would make a subtly wrong model.
  void require_all_taken() const {
    for (const gguf_tensor& tensor : file_.tensors()) {
      if (!taken_.contains(tensor.name)) {
        throw std::runtime_error(file_.path() + " has a tensor '" + std::string(tensor.name) +
                                 "', which this example does not use");
      }
    }
  }

 private:
  const gguf_tensor& take(const std::string& name, const std::vector<std::size_t>& shape) {
    const gguf_tensor& tensor = file_.tensor(name);
    if (tensor.shape != shape) {
      throw std::runtime_error("tensor '" + name + "' of " + file_.path() + " is " +
                               text_of(tensor.shape) + ", not " + text_of(shape));
    }
    taken_.insert(tensor.name);
    return tensor;
  }

  // Else the whole file would be resident beside the weights by the time they are all read.
  static void decode(const gguf_tensor& tensor, std::span<float> values) {
    dequantize(tensor, values);
    pages::evict(tensor.data);
  }

  const gguf_file& file_;
  std::set<std::string_view> taken_;
};

}  // namespace

std::size_t llama_weights::bytes_read() const {
  Eigen::Index elements = logits().size() + output_norm.size();
  for (const llama_layer& layer : layers) {
    for (const row_vector* each : {&layer.attention_norm, &layer.feed_norm}) {
      elements += each->size();
    }
    for (const matrix* each : {&layer.query, &layer.key, &layer.value, &layer.attention_output,
                               &layer.gate, &layer.up, &layer.down}) {
      elements += each->size();
    }
  }
  return static_cast<std::size_t>(elements) * sizeof(float);
}

llama_weights read_llama_weights(const gguf_file& file, const llama_config& config) {
  const std::size_t embedding = config.embedding;
  const std::size_t q_size = config.q_heads * config.head_dim;
  const std::size_t kv_size = config.kv_heads * config.head_dim;

  weight_reader reader(file);
  llama_weights weights;
  weights.embedding = reader.matrix_of("token_embd.weight", config.vocabulary, embedding);
  for (std::size_t i = 0; i < config.layers; ++i) {
    const std::string block = "blk." + std::to_string(i) + ".";
    llama_layer& layer = weights.layers.emplace_back();
    layer.attention_norm = reader.vector_of(block + "attn_norm.weight", embedding);
    layer.query = reader.matrix_of(block + "attn_q.weight", q_size, embedding);
    layer.key = reader.matrix_of(block + "attn_k.weight", kv_size, embedding);
    layer.value = reader.matrix_of(block + "attn_v.weight", kv_size, embedding);
    layer.attention_output = reader.matrix_of(block + "attn_output.weight", embedding, q_size);
    layer.feed_norm = reader.vector_of(block + "ffn_norm.weight", embedding);
    layer.gate = reader.matrix_of(block + "ffn_gate.weight", config.feed_forward, embedding);
    layer.up = reader.matrix_of(block + "ffn_up.weight", config.feed_forward, embedding);
    layer.down = reader.matrix_of(block + "ffn_down.weight", embedding, config.feed_forward);
  }
  weights.output_norm = reader.vector_of("output_norm.weight", embedding);
  if (file.has_tensor("output.weight")) {
    weights.output = reader.matrix_of("output.weight", config.vocabulary, embedding);
  }
  reader.require_all_taken();
  return weights;
}

}  // namespace smollm2
