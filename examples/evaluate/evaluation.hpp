// SPDX-License-Identifier: Apache-2.0
// One prompt: a prefill with the full cache and its answer, then what pruned copies make of it.
#pragma once

#include <functional>

#include "divergence.hpp"
#include "llama.hpp"
#include "prompts.hpp"
#include "pruning.hpp"

namespace evaluate {

// What a policy did to one prompt, or to all of them: means, the largest KL, the sum of keys.
struct measurement {
  double kept_fraction;  // mean over layers and KV heads
  smollm2::divergence against_full;
  std::size_t keys;       // that are recalled, of those that the full cache recalls
  double select_seconds;  // decisions and compaction of all layers
  double cache_bytes;     // before the question that comes after the pruning
};

class prompt_run {
 public:
  // Records each layer's last `window` queries of what is pruned. Where the answer is not known,
  // greedily generates `tokens` tokens. Policies see the layers from `full_layers` on.
  prompt_run(const smollm2::llama& model, const tokenized_prompt& prompt, std::size_t window,
             std::size_t tokens, std::size_t full_layers,
             const std::function<void(double)>& on_progress);

  // How many tokens are compared.
  std::size_t tokens() const { return answer_.size(); }

  // Whether there is a key to find, and whether its tokens are the most likely ones with the full
  // cache.
  bool has_key() const { return key_tokens_ > 0; }
  bool recalls_key() const { return recalls_key(logits_); }

  // Feeds the question and the answer to a pruned copy of the cache and compares what it predicts
  // after each token of the answer. The policy must look at no more than `window` queries. It also
  // prunes after every `prune_every` tokens of the answer; 0: never. Then what is kept is counted
  // at the end.
  measurement measure(const smollm2::pruning_policy& policy, int threads,
                      std::size_t prune_every) const;

 private:
  // Prunes a copy of the cache; adds to select_seconds.
  smollm2::kv_cache prune(smollm2::pruner& prune, std::size_t window, double& select_seconds) const;
  // The rows of a cache of `tokens` tokens.
  double kept_fraction(const smollm2::kv_cache& cache, std::size_t tokens) const;
  bool recalls_key(smollm2::logits_view logits) const;

  const smollm2::llama& model_;
  std::size_t full_layers_;
  smollm2::kv_cache full_;                   // of what is pruned
  std::vector<std::vector<float>> queries_;  // [layer] of [min(window, tokens), q_head, head_dim]
  std::vector<int> question_;
  std::vector<int> answer_;
  std::size_t key_tokens_;
  std::vector<std::vector<float>> logits_;  // after each token of the answer
};

}  // namespace evaluate
