// SPDX-License-Identifier: Apache-2.0
// One prompt: a prefill with the full cache and its answer, then what pruned copies make of it.
#pragma once

#include <functional>

#include "divergence.hpp"
#include "llama.hpp"
#include "pruning.hpp"

namespace evaluate {

// What a rule did to one prompt, or the mean over prompts.
struct measurement {
  double kept_fraction;  // mean over layers and KV heads
  smollm2::divergence against_full;
  double select_seconds;  // decisions and compaction of all layers
  double cache_bytes;
};

class prompt_run {
 public:
  // Records each layer's last `window` queries, and greedily generates `tokens` tokens. Rules see
  // the layers from `full_layers` on.
  prompt_run(const smollm2::llama& model, std::span<const int> prompt, std::size_t window,
             std::size_t tokens, std::size_t full_layers,
             const std::function<void(double)>& on_progress);

  // How many tokens are compared.
  std::size_t tokens() const { return answer_.size(); }

  // The share that the rule keeps.
  double kept_fraction(const smollm2::pruning_rule& rule, int threads) const;

  // Feeds the answer's tokens to a pruned copy of the cache and compares what it predicts after
  // each. The rule must look at no more than `window` queries.
  measurement measure(const smollm2::pruning_rule& rule, int threads) const;

 private:
  struct pruned_cache {
    smollm2::kv_cache cache;
    double kept_fraction;
    double select_seconds;
  };

  pruned_cache prune(smollm2::pruning_rule rule, int threads) const;

  const smollm2::llama& model_;
  std::size_t full_layers_;
  smollm2::kv_cache full_;
  std::vector<std::vector<float>> queries_;  // [layer] of [min(window, tokens), q_head, head_dim]
  std::vector<int> answer_;
  std::vector<std::vector<float>> logits_;  // after each token of the answer
};

}  // namespace evaluate
