// SPDX-License-Identifier: Apache-2.0
// The forward pass of a Llama model on the CPU, with a hook that may prune each layer's cache.
#pragma once

#include <concepts>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

#include "gguf.hpp"
#include "kv_cache.hpp"
#include "llama_config.hpp"

namespace smollm2 {

struct llama_layer;
struct llama_weights;
class rotary_table;

template <std::derived_from<sequence_memory> Cache>
struct prefill_hooks_for {
  // How many of the last tokens on_layer gets the queries of.
  std::size_t window = 1;

  // Called once a layer's cache holds the whole prompt, and before the next layer's cache exists.
  // Queries are rotated, [min(window, tokens), q_head, head_dim]. The hook may shrink the layer:
  // hidden states have been computed with all of it, so only later tokens notice.
  std::function<void(std::size_t layer, std::span<const float> queries, Cache& cache)> on_layer =
      {};

  // From just above 0 to 1.
  std::function<void(double fraction)> on_progress = {};
};
using prefill_hooks = prefill_hooks_for<kv_cache>;

class llama {
 public:
  // Copies the weights: the file may be closed afterwards.
  llama(const gguf_file& file, int threads);
  llama(llama&&) noexcept;
  llama& operator=(llama&&) noexcept;
  ~llama();

  const llama_config& config() const { return config_; }
  std::size_t weight_bytes() const;  // that decoding a token reads

  // An empty cache for one sequence.
  kv_cache new_cache() const;

  // Appends the tokens to the cache and returns the logits of the last one, [vocabulary].
  // Throws std::runtime_error where the tokens are none or do not fit into the model's context.
  template <std::derived_from<sequence_memory> Cache>
  std::vector<float> prefill(
      std::span<const int> tokens, Cache& cache,
      const std::type_identity_t<prefill_hooks_for<Cache>>& hooks = {}) const {
    return prefill_any(tokens, cache, any_of(hooks, cache));
  }

  // The same for one token, which attends over whatever rows each KV head still has.
  std::vector<float> decode(int token, sequence_memory& cache) const;

  // Decodes tokens that are known beforehand, all in one pass: [token] of [vocabulary].
  template <std::derived_from<sequence_memory> Cache>
  std::vector<std::vector<float>> score(
      std::span<const int> tokens, Cache& cache,
      const std::type_identity_t<prefill_hooks_for<Cache>>& hooks = {}) const {
    return score_any(tokens, cache, any_of(hooks, cache));
  }

 private:
  struct scratch;
  using any_hooks = prefill_hooks_for<sequence_memory>;

  template <class Cache>
  static any_hooks any_of(const prefill_hooks_for<Cache>& hooks, Cache& cache) {
    any_hooks any{hooks.window, {}, hooks.on_progress};
    if (hooks.on_layer) {
      any.on_layer = [&](std::size_t layer, std::span<const float> queries, sequence_memory&) {
        hooks.on_layer(layer, queries, cache);
      };
    }
    return any;
  }

  std::vector<float> prefill_any(std::span<const int> tokens, sequence_memory& cache,
                                 const any_hooks& hooks) const;
  std::vector<std::vector<float>> score_any(std::span<const int> tokens, sequence_memory& cache,
                                            const any_hooks& hooks) const;

  // The logits of the last `scored` tokens.
  std::vector<std::vector<float>> forward(std::span<const int> tokens, std::size_t scored,
                                          sequence_memory& cache, const any_hooks& hooks) const;

  // Takes a block of hidden states, the first of token number `first`, through a layer.
  void run_layer(const llama_layer& layer, const rotary_table& rotary, std::size_t first,
                 layer_memory& cache, scratch& buffers) const;

  llama_config config_;
  std::unique_ptr<const llama_weights> weights_;
  int threads_;
};

}  // namespace smollm2
