// SPDX-License-Identifier: Apache-2.0
// Prefill runs layer by layer over the whole prompt, and inside a layer by blocks of tokens.
#include "llama.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "attention.hpp"
#include "llama_weights.hpp"
#include "matrix.hpp"
#include "rotary.hpp"

namespace smollm2 {
namespace {

// Bounds the scratch memory; products of this many rows already run at full speed.
constexpr std::size_t block_tokens = 256;

// One row of the embedding per token.
matrix embed(std::span<const int> tokens, const matrix& embedding) {
  matrix hidden(index(tokens.size()), embedding.cols());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const int token = tokens[i];
    if (token < 0 || token >= embedding.rows()) {
      throw std::runtime_error("token " + std::to_string(token) + " is not in the vocabulary");
    }
    hidden.row(index(i)) = embedding.row(token);
  }
  return hidden;
}

// RMSNorm of every row.
void normalize(const Eigen::Ref<const matrix>& input, const row_vector& weight, float epsilon,
               matrix& output) {
  output.resize(input.rows(), input.cols());
  for (Eigen::Index token = 0; token < input.rows(); ++token) {
    const float mean_square = input.row(token).squaredNorm() / static_cast<float>(input.cols());
    output.row(token) =
        input.row(token).cwiseProduct(weight) * (1 / std::sqrt(mean_square + epsilon));
  }
}

// gate := silu(gate) * up, where silu(x) = x / (1 + exp(-x)).
void gate_with_silu(const matrix& up, matrix& gate) {
  gate.array() = gate.array() / (1 + (-gate.array()).exp()) * up.array();
}

}  // namespace

// What a layer computes for a block of tokens.
struct llama::scratch {
  matrix hidden;      // [token, embedding], in and out
  matrix normalized;  // [token, embedding]
  matrix queries;     // [token, q_head * head_dim]
  matrix keys;        // [token, kv_head * head_dim]
  matrix values;      // [token, kv_head * head_dim]
  matrix attended;    // [token, q_head * head_dim]
  matrix projected;   // [token, embedding]
  matrix gate;        // [token, feed_forward]
  matrix up;          // [token, feed_forward]
};

llama::llama(const gguf_file& file, int threads)
    : config_(read_llama_config(file)),
      weights_(std::make_unique<llama_weights>(read_llama_weights(file, config_))),
      threads_(threads) {
  if (threads < 1) throw std::invalid_argument("llama: at least one thread is needed");
}

llama::llama(llama&&) noexcept = default;
llama& llama::operator=(llama&&) noexcept = default;
llama::~llama() = default;

std::size_t llama::weight_bytes() const { return weights_->bytes_read(); }

kv_cache llama::new_cache() const {
  return kv_cache(config_.layers, config_.kv_heads, config_.head_dim);
}

std::vector<float> llama::prefill_any(std::span<const int> tokens, sequence_memory& cache,
                                      const any_hooks& hooks) const {
  if (tokens.empty()) throw std::runtime_error("the prompt has no tokens");
  const std::size_t text = cache.next_position() + tokens.size();
  if (text > config_.context) {
    throw std::runtime_error("the prompt has " + std::to_string(text) +
                             " tokens; the model's context is " + std::to_string(config_.context));
  }
  return std::move(forward(tokens, 1, cache, hooks).front());
}

std::vector<float> llama::decode(int token, sequence_memory& cache) const {
  return std::move(score_any({&token, 1}, cache, {}).front());
}

std::vector<std::vector<float>> llama::score_any(std::span<const int> tokens,
                                                 sequence_memory& cache,
                                                 const any_hooks& hooks) const {
  if (tokens.empty()) return {};
  if (cache.next_position() + tokens.size() > config_.context) {
    throw std::runtime_error("the model's context of " + std::to_string(config_.context) +
                             " tokens is full");
  }
  return forward(tokens, tokens.size(), cache, hooks);
}

std::vector<std::vector<float>> llama::forward(std::span<const int> tokens, std::size_t scored,
                                               sequence_memory& cache,
                                               const any_hooks& hooks) const {
  const std::size_t q_size = config_.q_heads * config_.head_dim;
  const std::size_t window = std::min(hooks.window, tokens.size());
  const std::size_t window_begin = tokens.size() - window;
  const std::size_t blocks = (tokens.size() + block_tokens - 1) / block_tokens;
  const rotary_table rotary(cache.next_position(), tokens.size(), config_.rope_dims,
                            config_.rope_base);

  matrix hidden = embed(tokens, weights_->embedding);  // [token, embedding]
  std::vector<float> window_queries(window * q_size);  // [window, q_head, head_dim]
  scratch buffers;
  for (std::size_t layer = 0; layer < config_.layers; ++layer) {
    cache.layer(layer).reserve(tokens.size());
    for (std::size_t block = 0; block < blocks; ++block) {
      const std::size_t begin = block * block_tokens;
      const std::size_t end = std::min(begin + block_tokens, tokens.size());
      auto rows = hidden.middleRows(index(begin), index(end - begin));
      buffers.hidden = rows;
      run_layer(weights_->layers[layer], rotary, begin, cache.layer(layer), buffers);
      rows = buffers.hidden;
      for (std::size_t token = std::max(begin, window_begin); token < end; ++token) {
        std::copy_n(buffers.queries.row(index(token - begin)).data(), q_size,
                    window_queries.data() + (token - window_begin) * q_size);
      }
      if (hooks.on_progress) {
        hooks.on_progress(static_cast<double>(layer * blocks + block + 1) /
                          static_cast<double>(config_.layers * blocks));
      }
    }
    if (hooks.on_layer) hooks.on_layer(layer, window_queries, cache);
  }
  cache.advance(tokens.size());

  normalize(hidden.bottomRows(index(scored)), weights_->output_norm, config_.norm_epsilon,
            buffers.normalized);
  matrix logits;  // [scored, vocabulary]
  project(buffers.normalized, weights_->logits(), threads_, logits);
  std::vector<std::vector<float>> result;
  for (const auto row : logits.rowwise()) result.emplace_back(row.begin(), row.end());
  return result;
}

void llama::run_layer(const llama_layer& layer, const rotary_table& rotary, std::size_t first,
                      layer_memory& cache, scratch& b) const {
  normalize(b.hidden, layer.attention_norm, config_.norm_epsilon, b.normalized);
  project(b.normalized, layer.query, threads_, b.queries);
  project(b.normalized, layer.key, threads_, b.keys);
  project(b.normalized, layer.value, threads_, b.values);
  rotary.rotate(first, config_.q_heads, config_.head_dim, elements_of(b.queries));
  rotary.rotate(first, config_.kv_heads, config_.head_dim, elements_of(b.keys));
  cache.append(elements_of(b.keys), elements_of(b.values));

  b.attended.resizeLike(b.queries);
  attend(elements_of(b.queries), config_.q_heads, cache, threads_, elements_of(b.attended));
  project(b.attended, layer.attention_output, threads_, b.projected);
  b.hidden += b.projected;

  normalize(b.hidden, layer.feed_norm, config_.norm_epsilon, b.normalized);
  project(b.normalized, layer.gate, threads_, b.gate);
  project(b.normalized, layer.up, threads_, b.up);
  gate_with_silu(b.up, b.gate);
  project(b.gate, layer.down, threads_, b.projected);
  b.hidden += b.projected;
}

}  // namespace smollm2
