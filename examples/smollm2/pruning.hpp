// SPDX-License-Identifier: Apache-2.0
// Where the engine meets refreekv: prunes one layer right after its prefill.
#pragma once

#include <refreekv/refreekv.hpp>
#include <span>
#include <vector>

#include "kv_cache.hpp"
#include "layer_pruning.hpp"
#include "pruning_rule.hpp"
#include "rule_runner.hpp"

namespace smollm2 {

struct curve_point {
  refreekv::position_t cut;
  float loss;
};

class pruner {
 public:
  pruner(const pruning_rule& rule, int threads) : rule_(rule), runner_(threads) {}

  // Decides on the layer, moves what is kept together, and gives the rest back to the operating
  // system. queries: [min(window, tokens), q_head, head_dim]. Throws std::runtime_error where
  // refreekv refuses, or where the rule is CAKE, which needs to get at all layers.
  layer_pruning prune(std::size_t layer, std::span<const float> queries, layer_cache& cache);

  // The same for any rule, one layer after the other from the first one on: CAKE then takes more
  // from earlier layers, too. Seconds are those of all that; the rest is about `layer`.
  layer_pruning prune(std::size_t layer, std::span<const float> queries, kv_cache& cache);

  // The loss over cuts of an unpruned layer, by asking for the cut of many thresholds.
  std::vector<curve_point> loss_curve(std::size_t layer, std::span<const float> queries,
                                      layer_cache& cache);

 private:
  // Decides on the layer that `seen` shows, then moves what stays together in its keys and values
  // and in `others`, and shrinks the cache.
  template <class Rule, class Seen, class... Others>
  layer_pruning apply(const Rule& rule, const Seen& seen, layer_cache& cache,
                      const Others&... others);

  layer_pruning cascade(const refreekv::policy::cake& rule, std::size_t layer,
                        std::span<const float> queries, kv_cache& cache);

  // What CAKE knows of the layers so far.
  struct cake_state {
    refreekv::position_t tokens;             // of the prompt
    std::vector<std::vector<float>> scores;  // [layer] of [kv_head, tokens]
    std::vector<double> preferences;         // [layer]
  };

  pruning_rule rule_;
  rule_runner runner_;
  cake_state cake_;
};

}  // namespace smollm2
