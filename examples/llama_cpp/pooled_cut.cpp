// SPDX-License-Identifier: Apache-2.0
#include "pooled_cut.hpp"

#include <stdexcept>
#include <vector>

#include "policy_runner.hpp"

namespace llama_cpp {

namespace {

using refreekv::index_t;

index_t signed_size(std::size_t size) { return static_cast<index_t>(size); }

// The layers of a batch that has a sequence for each, as ranks that share their heads.
struct sum_over_layers {
  index_t layers;

  refreekv::status operator()(double* sums, index_t count) const noexcept {
    const index_t length = count / layers;
    for (index_t i = 0; i < length; ++i) {
      double total = 0;
      for (index_t layer = 0; layer < layers; ++layer) total += sums[layer * length + i];
      for (index_t layer = 0; layer < layers; ++layer) sums[layer * length + i] = total;
    }
    return refreekv::status::ok;
  }
};

template <class Policy, class Layer>
refreekv::kept_range decide(const Policy& policy, const Layer& layer, int threads) {
  const refreekv::cpu_backend backend{threads};
  const index_t layers = layer.sequences();
  std::vector<refreekv::kept_range> kept(static_cast<std::size_t>(layers));
  std::vector<std::byte> scratch(refreekv::workspace_size(policy, backend, layer));
  smollm2::require_ok(refreekv::select(policy, backend, layer, {kept.data(), {layers, 1}}, scratch,
                                       sum_over_layers{layers}));
  refreekv::kept_range all = kept.front();
  for (const auto& range : kept) all = refreekv::unite(all, range);  // for the largest dropped mass
  return all;
}

// The keys of the prompt in one layer's cache tensor, in its elements or as floats.
std::vector<float> copy_of_keys(const ggml_tensor& cache, std::size_t tokens) {
  const std::size_t row = static_cast<std::size_t>(cache.ne[0]);
  std::vector<float> keys(tokens * row);
  if (cache.type == GGML_TYPE_F32) {
    ggml_backend_tensor_get(&cache, keys.data(), 0, keys.size() * sizeof(float));
    return keys;
  }
  std::vector<std::byte> stored(tokens * cache.nb[1]);
  ggml_backend_tensor_get(&cache, stored.data(), 0, stored.size());
  const auto to_float = ggml_get_type_traits(cache.type)->to_float;
  to_float(stored.data(), keys.data(), signed_size(keys.size()));
  return keys;
}

// first(layer): the first key of a layer, of all heads' [token, kv_head, head_dim].
template <class T, class Policy, class First>
refreekv::kept_range decide_on_keys(const Policy& policy, const attention_tap& tap, int threads,
                                    const First& first) {
  const index_t tokens = signed_size(tap.tokens()), heads = signed_size(tap.kv_heads());
  const index_t dim = signed_size(tap.head_dim()), layers = signed_size(tap.layers());
  std::vector<refreekv::dense<const T>> keys;
  for (std::size_t layer = 0; layer < tap.layers(); ++layer) {
    keys.emplace_back(refreekv::view<const T, 4>(first(layer), {1, heads, tokens, dim},
                                                 {0, dim, heads * dim, 1}));
  }
  const refreekv::view queries(tap.queries().data(),
                               {layers, signed_size(tap.rows()), signed_size(tap.q_heads()), dim});
  const refreekv::layer_info<> info{signed_size(tap.first_layer()),
                                    {.scale = tap.scale(), .soft_cap = tap.soft_cap()}};
  const refreekv::view<const refreekv::dense<const T>, 1> table(keys.data(), {layers});
  return decide(policy, refreekv::observe(queries, refreekv::layered(table, keys.front()), info),
                threads);
}

template <class Policy>
refreekv::kept_range decide_on_queries(const Policy& policy, const attention_tap& tap,
                                       int threads) {
  const ggml_tensor& first_cache = *tap.keys().front();
  const bool in_host_memory = ggml_backend_buffer_is_host(first_cache.buffer);
  if (in_host_memory && first_cache.type == GGML_TYPE_F16) {
    using refreekv::f16_bits;
    return decide_on_keys<f16_bits>(policy, tap, threads, [&](std::size_t layer) {
      return static_cast<const f16_bits*>(tap.keys()[layer]->data);
    });
  }
  if (in_host_memory && first_cache.type == GGML_TYPE_F32) {
    return decide_on_keys<float>(policy, tap, threads, [&](std::size_t layer) {
      return static_cast<const float*>(tap.keys()[layer]->data);
    });
  }
  std::vector<std::vector<float>> copies;
  for (const ggml_tensor* cache : tap.keys()) {
    copies.push_back(copy_of_keys(*cache, tap.tokens()));
  }
  return decide_on_keys<float>(policy, tap, threads,
                               [&](std::size_t layer) { return copies[layer].data(); });
}

template <class Policy>
refreekv::kept_range decide_on_rows(const Policy& policy, const attention_tap& tap, int threads) {
  const index_t q_heads = signed_size(tap.q_heads());
  const refreekv::view rows(
      tap.attention().data(),
      {signed_size(tap.layers()), signed_size(tap.rows()), q_heads, signed_size(tap.tokens())});
  // One cut needs no KV heads.
  return decide(policy, refreekv::observe_rows(rows, q_heads, {}, {signed_size(tap.first_layer())}),
                threads);
}

}  // namespace

const char* why_unpoolable(const smollm2::pruning_policy& policy) {
  return std::visit(
      [](const auto& alternative) -> const char* {
        using Policy = std::remove_cvref_t<decltype(alternative)>;
        if constexpr (std::same_as<Policy, refreekv::policy::refreekv>) {
          if (alternative.scope == refreekv::cut_scope::kv_head) {
            return "in llama.cpp all layers and heads share their cells: no cut for each KV head";
          }
        } else if constexpr (!std::same_as<Policy, smollm2::keep_everything> &&
                             !smollm2::range_policy<Policy>) {
          return "in llama.cpp all layers and heads share their cells: a policy that scores "
                 "tokens, for each layer and KV head, has nothing to remove there";
        }
        return nullptr;
      },
      policy);
}

std::size_t first_layer_of(const smollm2::pruning_policy& policy) {
  const auto* cut = std::get_if<refreekv::policy::refreekv>(&policy);
  return cut == nullptr ? 0 : cut->full_layers;
}

refreekv::kept_range pooled_cut(const smollm2::pruning_policy& policy, const attention_tap& tap,
                                int threads) {
  if (const char* reason = why_unpoolable(policy)) throw std::runtime_error(reason);
  return std::visit(
      [&](const auto& alternative) -> refreekv::kept_range {
        using Policy = std::remove_cvref_t<decltype(alternative)>;
        if constexpr (smollm2::range_policy<Policy>) {
          if (tap.layers() > 0) {
            return tap.keys().empty() ? decide_on_rows(alternative, tap, threads)
                                      : decide_on_queries(alternative, tap, threads);
          }
        }
        return {.tokens = static_cast<refreekv::position_t>(tap.tokens())};
      },
      policy);
}

}  // namespace llama_cpp
