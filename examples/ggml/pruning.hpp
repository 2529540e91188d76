// SPDX-License-Identifier: Apache-2.0
// Where the engine on ggml meets refreekv: prunes one layer right after its prefill.
#pragma once

#include <span>

#include "ggml/layer_cache.hpp"
#include "llama_config.hpp"
#include "policy_runner.hpp"

namespace ggml_engine {

// Null, or why no layer can be pruned by the policy: the KV heads of a layer share its length here.
const char* why_unsuitable(const smollm2::pruning_policy& policy);

class pruner {
 public:
  pruner(const smollm2::pruning_policy& policy, const smollm2::llama_config& config, int threads)
      : policy_(policy), config_(config), runner_(threads) {}

  // Decides on the layer, moves what is kept together, and gives the rest back to the operating
  // system. queries: [min(window, tokens), q_head, head_dim]. Throws std::runtime_error where
  // refreekv refuses, or where the KV heads keep different numbers of tokens.
  smollm2::layer_pruning prune(std::size_t layer, std::span<const float> queries,
                               layer_cache& cache);

 private:
  smollm2::pruning_policy policy_;
  smollm2::llama_config config_;
  smollm2::policy_runner runner_;
};

}  // namespace ggml_engine
