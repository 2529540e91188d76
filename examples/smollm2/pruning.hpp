// SPDX-License-Identifier: Apache-2.0
// Where the engine meets refreekv: prunes one layer right after its prefill.
#pragma once

#include <refreekv/refreekv.hpp>
#include <span>
#include <vector>

#include "kv_cache.hpp"
#include "layer_pruning.hpp"
#include "policy_runner.hpp"
#include "pruning_policy.hpp"
#include "remaining_tokens.hpp"

namespace smollm2 {

struct curve_point {
  refreekv::position_t cut;
  float loss;
};

// What became of one KV head's tokens.
struct pruned_slots {
  std::size_t settled = 0;  // slots that the last pruning left
  std::size_t seen = 0;     // tokens that the cache ever had
};

// Prunes a conversation's cache after each of its prompts, or while an answer is decoded.
class pruner {
 public:
  // keep: tokens of the text, first position to past the last one, that stay whatever the policy
  // says. Throws std::runtime_error where there are any and the policy keeps no range.
  pruner(const pruning_policy& policy, std::size_t q_heads, int threads,
         std::vector<refreekv::token_range> keep = {});
  // The same past, for a copy of the cache; threads of its own.
  pruner(const pruner& other);

  // Decides on the slots that the layer has, moves what is kept together, and gives the rest back
  // to the operating system. queries: [row, q_head, head_dim] of the last tokens, as many as the
  // policy's window or, where the prompt is shorter, all of it. Throws std::runtime_error where
  // refreekv refuses, where heads that differ in length are to share a cut, or where the policy is
  // CAKE, which needs to get at all layers.
  layer_pruning prune(std::size_t layer, std::span<const float> queries, layer_cache& cache);

  // The same for any policy, one layer after the other from the first one on: CAKE then takes more
  // from earlier layers, too, and has one prompt only. Seconds are those of all that; the rest is
  // about `layer`.
  layer_pruning prune(std::size_t layer, std::span<const float> queries, kv_cache& cache);

  // The loss over cuts of a layer whose heads have one length, by asking for the cut of many
  // thresholds.
  std::vector<curve_point> loss_curve(std::size_t layer, std::span<const float> queries,
                                      layer_cache& cache);

 private:
  // For KV heads that are decided on together, decide_and_compact(heads, result) fills in what
  // stays, moves it, and returns in which slots it is, [group]. The cache shrinks to that.
  template <class F>
  layer_pruning shrink(layer_cache& cache, const F& decide_and_compact);

  // Widens what is kept of these heads, [group], by the protected tokens that are left.
  void protect(remaining_tokens& left, std::size_t first_head, std::size_t heads,
               std::vector<refreekv::kept_range>& kept) const;

  layer_pruning cascade(const refreekv::policy::cake& policy, std::size_t layer,
                        std::span<const float> queries, kv_cache& cache);

  // What CAKE knows of the layers so far.
  struct cake_state {
    refreekv::position_t tokens;             // of the prompt
    std::vector<std::vector<float>> scores;  // [layer] of [kv_head, tokens]
    std::vector<double> preferences;         // [layer]
  };

  pruning_policy policy_;
  std::size_t q_heads_;
  int threads_;
  policy_runner runner_;
  std::vector<refreekv::token_range> keep_;
  std::vector<remaining_tokens> left_;  // [layer]; followed only if there are tokens to keep
  std::vector<std::vector<pruned_slots>> slots_;  // [layer][kv_head]
  cake_state cake_;
};

}  // namespace smollm2
