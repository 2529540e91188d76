// SPDX-License-Identifier: Apache-2.0
// Prefill runs layer by layer over the whole prompt, and inside a layer by chunks of tokens.
#include "ggml/llama.hpp"

#include <ggml-cpu.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace ggml_engine {

namespace {

constexpr std::size_t chunk_tokens = 256;

int64_t extent(std::size_t value) { return static_cast<int64_t>(value); }

// [token, slot]: 0 where a token sees a slot, else -infinity. The tokens are the last slots.
std::vector<ggml_fp16_t> mask_of(const layer_cache& cache, std::size_t tokens) {
  const ggml_fp16_t visible = ggml_fp32_to_fp16(0);
  const ggml_fp16_t hidden = ggml_fp32_to_fp16(-std::numeric_limits<float>::infinity());
  const std::size_t slots = cache.length() + tokens;
  std::vector<ggml_fp16_t> mask(tokens * slots, hidden);
  for (std::size_t token = 0; token < tokens; ++token) {
    for (std::size_t slot = 0; slot <= cache.length() + token; ++slot) {
      if (!cache.hides(slot)) mask[token * slots + slot] = visible;
    }
  }
  return mask;
}

}  // namespace

// One computation: its nodes, and the values that go in before it runs.
struct llama::graph {
  explicit graph(const llama& of) : model(of) {
    const std::size_t capacity = 32 * (model.config_.layers + 1);
    context.reset(
        ggml_init({capacity * ggml_tensor_overhead() + ggml_graph_overhead_custom(capacity, false),
                   nullptr, /*no_alloc=*/true}));
    nodes = ggml_new_graph_custom(context.get(), capacity, false);
  }

  // The graph reads `values` when it is computed.
  template <class T>
  ggml_tensor* input(ggml_type type, std::vector<T> values, int64_t columns, int64_t rows = 1) {
    ggml_tensor* tensor = ggml_new_tensor_2d(context.get(), type, columns, rows);
    ggml_set_input(tensor);
    inputs.emplace_back([tensor, values = std::move(values)] {
      ggml_backend_tensor_set(tensor, values.data(), 0, values.size() * sizeof(T));
    });
    return tensor;
  }

  // Computed, and still there afterwards.
  ggml_tensor* output(ggml_tensor* tensor) {
    ggml_set_output(tensor);
    ggml_build_forward_expand(nodes, tensor);
    return tensor;
  }

  ggml_tensor* embed(std::span<const int> tokens) {
    for (const int token : tokens) {
      if (token < 0 || static_cast<std::size_t>(token) >= model.config_.vocabulary) {
        throw std::runtime_error("token " + std::to_string(token) + " is not in the vocabulary");
      }
    }
    const auto ids =
        input(GGML_TYPE_I32, std::vector<int>(tokens.begin(), tokens.end()), extent(tokens.size()));
    return ggml_get_rows(context.get(), model.weights_.embedding, ids);
  }

  // The positions of `tokens` tokens.
  ggml_tensor* positions(std::size_t first, std::size_t tokens) {
    std::vector<int> numbers(tokens);
    std::iota(numbers.begin(), numbers.end(), static_cast<int>(first));
    return input(GGML_TYPE_I32, std::move(numbers), extent(tokens));
  }

  ggml_tensor* normalize(ggml_tensor* x, ggml_tensor* weight) {
    return ggml_mul(context.get(), ggml_rms_norm(context.get(), x, model.config_.norm_epsilon),
                    weight);
  }

  // [token, head, head_dim] of x, rotated.
  ggml_tensor* rotate(ggml_tensor* x, std::size_t heads, ggml_tensor* positions) {
    const auto& config = model.config_;
    ggml_tensor* rows =
        ggml_reshape_3d(context.get(), x, extent(config.head_dim), extent(heads), x->ne[1]);
    return ggml_rope_ext(context.get(), rows, positions, nullptr,
                         static_cast<int>(config.rope_dims), GGML_ROPE_TYPE_NORMAL,
                         static_cast<int>(config.context), static_cast<float>(config.rope_base), 1,
                         0, 1, 32, 1);
  }

  // Writes rows into the slots after those in use.
  void append(ggml_tensor* rows, ggml_tensor* to, std::size_t length, int64_t tokens) {
    ggml_tensor* slots =
        ggml_view_2d(context.get(), to, to->ne[0], tokens, to->nb[1], length * to->nb[1]);
    ggml_build_forward_expand(nodes, ggml_cpy(context.get(), rows, slots));
  }

  // [kv_head, slot, head_dim] of the slots in use and of the tokens just appended.
  ggml_tensor* heads_of(ggml_tensor* cached, std::size_t slots) {
    const auto& config = model.config_;
    return ggml_view_3d(context.get(), cached, extent(config.head_dim), extent(slots),
                        extent(config.kv_heads), cached->nb[1],
                        config.head_dim * ggml_element_size(cached), 0);
  }

  struct layer_result {
    ggml_tensor* hidden;
    ggml_tensor* queries;
  };

  // Takes hidden states through a layer. The cache must have room for their tokens.
  layer_result run_layer(const layer_weights& layer, ggml_tensor* hidden, ggml_tensor* positions,
                         const layer_cache& cache) {
    ggml_context* c = context.get();
    const auto& config = model.config_;
    const int64_t tokens = hidden->ne[1];
    const std::size_t slots = cache.length() + static_cast<std::size_t>(tokens);

    ggml_tensor* x = normalize(hidden, layer.attention_norm);
    ggml_tensor* queries = rotate(ggml_mul_mat(c, layer.query, x), config.q_heads, positions);
    append(rotate(ggml_mul_mat(c, layer.key, x), config.kv_heads, positions), cache.keys(),
           cache.length(), tokens);
    append(ggml_mul_mat(c, layer.value, x), cache.values(), cache.length(), tokens);

    // One token sees all slots.
    ggml_tensor* mask = nullptr;
    if (tokens > 1 || cache.hides()) {
      mask = input(GGML_TYPE_F16, mask_of(cache, static_cast<std::size_t>(tokens)), extent(slots),
                   tokens);
    }
    const float scale = 1 / std::sqrt(static_cast<float>(config.head_dim));
    ggml_tensor* attended = ggml_flash_attn_ext(
        c, ggml_permute(c, queries, 0, 2, 1, 3), heads_of(cache.keys(), slots),
        heads_of(cache.values(), slots), mask, scale, 0, 0);  // [token, q_head, head_dim]
    attended = ggml_reshape_2d(c, attended, extent(config.embedding), tokens);
    hidden = ggml_add(c, hidden, ggml_mul_mat(c, layer.attention_output, attended));

    x = normalize(hidden, layer.feed_norm);
    ggml_tensor* gated =
        ggml_swiglu_split(c, ggml_mul_mat(c, layer.gate, x), ggml_mul_mat(c, layer.up, x));
    return {ggml_add(c, hidden, ggml_mul_mat(c, layer.down, gated)), queries};
  }

  ggml_tensor* logits(ggml_tensor* hidden) {
    return ggml_mul_mat(context.get(), model.weights_.output,
                        normalize(hidden, model.weights_.output_norm));
  }

  void compute() {
    if (!ggml_gallocr_alloc_graph(model.activations_.get(), nodes)) throw std::bad_alloc();
    for (const auto& set : inputs) set();
    if (ggml_backend_graph_compute(model.backend_.get(), nodes) != GGML_STATUS_SUCCESS) {
      throw std::runtime_error("ggml could not compute a graph");
    }
  }

  const llama& model;
  ggml_context_ptr context;
  ggml_cgraph* nodes;
  std::vector<std::function<void()>> inputs;
};

namespace {

// Rows [first, first + rows) of a computed tensor, whose rows are `columns` wide.
void read_rows(const ggml_tensor* tensor, std::size_t columns, std::size_t first,
               std::span<float> to) {
  ggml_backend_tensor_get(tensor, to.data(), first * columns * sizeof(float), to.size_bytes());
}

}  // namespace

kv_cache kv_cache::copy() const {
  kv_cache result{{}, next_position};
  for (const layer_cache& layer : layers) result.layers.push_back(layer.copy());
  return result;
}

std::size_t kv_cache::bytes_in_use() const {
  std::size_t bytes = 0;
  for (const layer_cache& layer : layers) bytes += layer.bytes_in_use();
  return bytes;
}

llama::llama(const smollm2::gguf_file& file, int threads)
    : config_(smollm2::read_llama_config(file)),
      weights_(read_weights(file.path(), config_)),
      backend_(ggml_backend_cpu_init()),
      activations_(ggml_gallocr_new(ggml_backend_cpu_buffer_type())) {
  ggml_backend_cpu_set_n_threads(backend_.get(), threads);
}

kv_cache llama::new_cache() const {
  kv_cache cache;
  for (std::size_t i = 0; i < config_.layers; ++i) {
    cache.layers.emplace_back(config_.kv_heads * config_.head_dim);
  }
  return cache;
}

void llama::require_room(std::size_t tokens, const kv_cache& cache) const {
  if (tokens == 0) throw std::runtime_error("the prompt has no tokens");
  if (cache.next_position + tokens > config_.context) {
    throw std::runtime_error("the text has " + std::to_string(cache.next_position + tokens) +
                             " tokens; the model's context is " + std::to_string(config_.context));
  }
}

std::vector<float> llama::prefill(std::span<const int> tokens, kv_cache& cache,
                                  const prefill_hooks& hooks) {
  require_room(tokens.size(), cache);
  const std::size_t width = config_.embedding;  // of a hidden state, and of all heads' queries
  const std::size_t window = std::min(hooks.window, tokens.size());
  const std::size_t window_begin = tokens.size() - window;
  const std::size_t chunks = (tokens.size() + chunk_tokens - 1) / chunk_tokens;

  std::vector<float> hidden(tokens.size() * width);  // [token, embedding]
  std::vector<float> queries(window * width);        // [window, q_head, head_dim]
  for (std::size_t layer = 0; layer < config_.layers; ++layer) {
    layer_cache& memory = cache.layers[layer];
    memory.reserve(tokens.size());
    for (std::size_t chunk = 0; chunk < chunks; ++chunk) {
      const std::size_t begin = chunk * chunk_tokens;
      const std::size_t count = std::min(chunk_tokens, tokens.size() - begin);
      const auto rows = std::span(hidden).subspan(begin * width, count * width);
      graph step(*this);
      ggml_tensor* in =
          layer == 0 ? step.embed(tokens.subspan(begin, count))
                     : step.input(GGML_TYPE_F32, std::vector<float>(rows.begin(), rows.end()),
                                  extent(width), extent(count));
      const auto [out, layer_queries] = step.run_layer(
          weights_.layers[layer], in, step.positions(cache.next_position + begin, count), memory);
      step.output(layer_queries);
      step.output(out);
      step.compute();
      memory.advance(count);
      read_rows(out, width, 0, rows);
      const std::size_t first = std::max(begin, window_begin);
      if (first < begin + count) {
        read_rows(layer_queries, width, first - begin,
                  std::span(queries).subspan((first - window_begin) * width,
                                             (begin + count - first) * width));
      }
      if (hooks.on_progress) {
        hooks.on_progress(static_cast<double>(layer * chunks + chunk + 1) /
                          static_cast<double>(config_.layers * chunks));
      }
    }
    if (hooks.on_layer) hooks.on_layer(layer, queries, memory);
  }
  cache.next_position += tokens.size();

  graph end(*this);
  ggml_tensor* logits = end.output(end.logits(
      end.input(GGML_TYPE_F32, std::vector<float>(hidden.end() - extent(width), hidden.end()),
                extent(width))));
  end.compute();
  std::vector<float> result(config_.vocabulary);
  read_rows(logits, result.size(), 0, result);
  return result;
}

std::vector<float> llama::decode(int token, kv_cache& cache) {
  require_room(1, cache);
  for (layer_cache& layer : cache.layers) layer.reserve(1);
  graph step(*this);
  ggml_tensor* hidden = step.embed(std::span(&token, 1));
  ggml_tensor* position = step.positions(cache.next_position, 1);
  for (std::size_t layer = 0; layer < config_.layers; ++layer) {
    hidden = step.run_layer(weights_.layers[layer], hidden, position, cache.layers[layer]).hidden;
  }
  ggml_tensor* logits = step.output(step.logits(hidden));
  step.compute();
  for (layer_cache& layer : cache.layers) layer.advance(1);
  ++cache.next_position;
  std::vector<float> result(config_.vocabulary);
  read_rows(logits, result.size(), 0, result);
  return result;
}

}  // namespace ggml_engine
