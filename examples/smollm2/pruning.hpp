// SPDX-License-Identifier: Apache-2.0
// Where the engine meets refreekv: prunes one layer right after its prefill.
#pragma once

#include <refreekv/refreekv.hpp>
#include <span>
#include <variant>
#include <vector>

#include "kv_cache.hpp"

namespace smollm2 {

struct keep_everything {};
using pruning_rule =
    std::variant<refreekv::policy::refreekv, refreekv::policy::streaming_llm, refreekv::policy::h2o,
                 refreekv::policy::snapkv, refreekv::policy::pyramidkv, refreekv::policy::cake,
                 refreekv::policy::attention_ranked, refreekv::policy::twilight, keep_everything>;

// Null, or what is wrong with the rule's options.
const char* why_invalid(const pruning_rule& rule);

// How many of the last queries the rule looks at; where it is more than there are, all.
std::size_t window_of(const pruning_rule& rule);

// Tells a rule that spreads a budget over the layers how many there are.
void set_layers(pruning_rule& rule, std::size_t layers);

struct curve_point {
  refreekv::position_t cut;
  float loss;
};

struct layer_pruning {
  // What stays is a range, [group]: 1, or one for each KV head; or tokens anywhere, [kv_head].
  // Both are empty where nothing was decided.
  std::vector<refreekv::kept_range> kept;
  std::vector<refreekv::kept_count> counts;
  std::size_t tokens;
  std::size_t bytes_before;  // as allocated
  std::size_t bytes_after;
  double seconds;          // decision, compaction and giving memory back
  double library_seconds;  // decision and compaction

  double kept_fraction() const;
};

class pruner {
 public:
  pruner(const pruning_rule& rule, int threads) : rule_(rule), pool_(threads) {}

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
  // Fills in what stays of the layer.
  template <class Rule, class Seen>
  void decide(const Rule& rule, const Seen& seen, layer_pruning& result);

  // Decides on the layer that `seen` shows, then moves what stays together in its keys and values
  // and in `others`, and shrinks the cache.
  template <class Rule, class Seen, class... Others>
  layer_pruning apply(const Rule& rule, const Seen& seen, layer_cache& cache,
                      const Others&... others);

  // The tokens that result.counts counts.
  refreekv::kept_positions<> positions_of(layer_pruning& result);

  layer_pruning cascade(const refreekv::policy::cake& rule, std::size_t layer,
                        std::span<const float> queries, kv_cache& cache);

  // What CAKE knows of the layers so far.
  struct cake_state {
    refreekv::position_t tokens;             // of the prompt
    std::vector<std::vector<float>> scores;  // [layer] of [kv_head, tokens]
    std::vector<double> preferences;         // [layer]
  };

  pruning_rule rule_;
  refreekv::thread_pool pool_;
  std::vector<std::byte> scratch_;               // grows with the largest layer, then stays
  std::vector<refreekv::position_t> positions_;  // [kv_head, tokens], the same
  cake_state cake_;
};

}  // namespace smollm2
