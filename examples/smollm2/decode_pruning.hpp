// SPDX-License-Identifier: Apache-2.0
// Prunes a cache while an answer is decoded: after every so many tokens, each layer as it is done
// with the last of them.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "llama.hpp"
#include "pruning.hpp"

namespace smollm2 {

class decode_pruning {
 public:
  // every: tokens between two prunings; 0 for none. window: queries that the pruner's policy looks
  // at. Layers before first_layer are not pruned.
  decode_pruning(const llama& model, pruner& prune, std::size_t every, std::size_t window,
                 std::size_t first_layer = 0);

  // Appends a token to the cache and returns the logits of what follows it, [vocabulary].
  std::vector<float> decode(int token, kv_cache& cache);

  // Appends tokens that are known beforehand and returns the logits after each, [token] of
  // [vocabulary]. Prunes where `decode` would, but takes the tokens between two prunings in one
  // pass.
  std::vector<std::vector<float>> score(std::span<const int> tokens, kv_cache& cache);

 private:
  // Appends tokens of which only the last may be due; returns the logits after each.
  std::vector<std::vector<float>> append(std::span<const int> tokens, kv_cache& cache);

  const llama& model_;
  pruner& prune_;
  std::size_t every_, window_, first_layer_;
  std::size_t since_ = 0;                   // tokens since the last pruning
  std::vector<std::vector<float>> recent_;  // [layer] of [up to window, q_head, head_dim]
};

}  // namespace smollm2
