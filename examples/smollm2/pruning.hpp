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
    std::variant<refreekv::policy::refreekv, refreekv::policy::streaming_llm, keep_everything>;

// Null, or what is wrong with the rule's options.
const char* why_invalid(const pruning_rule& rule);

// How many of the last queries the rule looks at.
std::size_t window_of(const pruning_rule& rule);

struct curve_point {
  refreekv::position_t cut;
  float loss;
};

struct layer_pruning {
  std::vector<refreekv::kept_range> kept;  // [group]: 1, or one for each KV head; empty for none
  std::size_t tokens;
  std::size_t bytes_before;  // as allocated
  std::size_t bytes_after;
  double seconds;  // decision, compaction and giving memory back

  double kept_fraction() const;
};

class pruner {
 public:
  pruner(const pruning_rule& rule, int threads) : rule_(rule), pool_(threads) {}

  // Decides on the layer, moves the sinks up to what is kept, and gives the rest back to the
  // operating system. queries: [window, q_head, head_dim]. Throws std::runtime_error where refreekv
  // refuses.
  layer_pruning prune(std::size_t layer, std::span<const float> queries, layer_cache& cache);

  // The loss over cuts of an unpruned layer, by asking for the cut of many thresholds.
  std::vector<curve_point> loss_curve(std::size_t layer, std::span<const float> queries,
                                      layer_cache& cache);

 private:
  // kept: [group]
  template <class Rule>
  std::vector<refreekv::kept_range> select(const Rule& rule, std::size_t layer,
                                           std::span<const float> queries, layer_cache& cache);

  pruning_rule rule_;
  refreekv::thread_pool pool_;
  std::vector<std::byte> scratch_;  // grows with the largest layer, then stays
};

}  // namespace smollm2
