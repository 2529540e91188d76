// SPDX-License-Identifier: Apache-2.0
#include "ggml/pruning.hpp"

#include <algorithm>
#include <stdexcept>

#include "stopwatch.hpp"

namespace ggml_engine {

using refreekv::index_t;

namespace {

constexpr const char* one_length =
    "the KV heads of a layer share its length here: no rule that keeps more of one than of another";

// Keys or values of all KV heads, as ggml has them: [sequence = 1, kv_head, token, head_dim].
refreekv::dense<refreekv::f16_bits> source_of(const ggml_tensor* tensor, std::size_t tokens,
                                              std::size_t kv_heads) {
  const auto row = static_cast<index_t>(tensor->ne[0]), heads = static_cast<index_t>(kv_heads);
  return refreekv::dense(refreekv::view(static_cast<refreekv::f16_bits*>(tensor->data),
                                        {1, heads, static_cast<index_t>(tokens), row / heads},
                                        {0, row / heads, row, 1}));
}

}  // namespace

const char* why_unsuitable(const smollm2::pruning_policy& policy) {
  const auto by_head = [](const auto* each) {
    return each != nullptr && each->scope == refreekv::cut_scope::kv_head;
  };
  const bool differs = by_head(std::get_if<refreekv::policy::refreekv>(&policy)) ||
                       by_head(std::get_if<refreekv::policy::faithful>(&policy)) ||
                       std::holds_alternative<refreekv::policy::attention_ranked>(policy) ||
                       std::holds_alternative<refreekv::policy::twilight>(policy);
  if (std::holds_alternative<refreekv::policy::cake>(policy)) {
    return "cake shares its budget among the layers, each of which is pruned on its own here";
  }
  return differs ? one_length : nullptr;
}

smollm2::layer_pruning pruner::prune(std::size_t layer, std::span<const float> queries,
                                     layer_cache& cache) {
  const smollm2::stopwatch watch;
  smollm2::layer_pruning result{{}, {}, {}, cache.length(), cache.bytes(), cache.bytes(), 0, 0};
  if (std::holds_alternative<smollm2::keep_everything>(policy_)) return result;

  const auto keys = source_of(cache.keys(), cache.length(), config_.kv_heads);
  const auto values = source_of(cache.values(), cache.length(), config_.kv_heads);
  const auto q_heads = static_cast<index_t>(config_.q_heads), dim = keys.shape().head_dim;
  const index_t rows = static_cast<index_t>(queries.size()) / (q_heads * dim);
  const auto model_layer =
      refreekv::observe(refreekv::view(queries.data(), {1, rows, q_heads, dim}), keys,
                        {.index = static_cast<index_t>(layer)});
  runner_.decide(policy_, model_layer, values, result);
  const auto slots = runner_.compact(result, keys, values);
  result.library_seconds = watch.seconds();

  const auto differs = [&](const smollm2::slot_range& head) {
    return head.length != slots.front().length || head.first != slots.front().first;
  };
  if (std::any_of(slots.begin(), slots.end(), differs)) throw std::runtime_error(one_length);
  cache.retain(slots.front());
  result.bytes_after = cache.bytes();
  result.seconds = watch.seconds();
  return result;
}

}  // namespace ggml_engine
