// SPDX-License-Identifier: Apache-2.0
// The engine's caches hold what the library decided, whatever form the decision has.
#include "pruning.hpp"

#include <algorithm>
#include <random>

#include "catch.hpp"

using namespace smollm2;

namespace {

constexpr std::size_t layers = 4, kv_heads = 2, group = 3, head_dim = 8, tokens = 200, window = 16;

struct filled_model {
  kv_cache cache{layers, kv_heads, head_dim};
  std::vector<std::vector<float>> queries;  // [layer] of [window, q_head, head_dim]

  filled_model() {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto noise = [&](std::size_t count) {
      std::vector<float> values(count);
      std::generate(values.begin(), values.end(), [&] { return normal(random); });
      return values;
    };
    for (std::size_t l = 0; l < layers; ++l) {
      const std::vector<float> keys = noise(tokens * kv_heads * head_dim);
      cache.layer(l).append(keys, noise(keys.size()));
      queries.push_back(noise(window * kv_heads * group * head_dim));
    }
  }
};

/// Whether each row of a head is one of the full cache's, in order, values beside their keys, the
/// last `recent` among them.
bool is_part_of(const layer_cache& pruned, const layer_cache& full, std::size_t head,
                std::size_t recent) {
  const auto same_row = [](const float* a, const float* b) {
    return std::equal(a, a + head_dim, b);
  };
  std::size_t from = 0;
  for (std::size_t slot = 0; slot < pruned.length(head); ++slot, ++from) {
    const float* key = pruned.keys(head) + slot * head_dim;
    while (from < tokens && !same_row(full.keys(head) + from * head_dim, key)) ++from;
    if (from == tokens) return false;
    if (!same_row(full.values(head) + from * head_dim, pruned.values(head) + slot * head_dim)) {
      return false;
    }
    if (slot + recent == pruned.length(head) && from + recent != tokens) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("policies that keep single tokens leave them in order") {
  const filled_model model;
  using namespace refreekv::policy;
  const std::vector<pruning_policy> policies{h2o{.budget = 60, .recent = 20, .window = 16},
                                             snapkv{.budget = 60, .window = 16},
                                             pyramidkv{.budget = 60, .window = 8, .layers = layers},
                                             tova{.budget = 60},
                                             attention_ranked{.threshold = 0.2},
                                             twilight{.mass = 0.5}};
  for (const pruning_policy& policy : policies) {
    CAPTURE(policy.index());
    CHECK(why_invalid(policy) == nullptr);
    pruner prune(policy, kv_heads * group, 2);
    kv_cache cache = model.cache;
    const std::size_t rows = std::min(window, window_of(policy));
    const std::span<const float> queries(model.queries[2]);
    const layer_pruning result =
        prune.prune(2, queries.last(rows * kv_heads * group * head_dim), cache);
    CHECK(result.tokens == tokens);
    CHECK(result.kept_fraction() < 1);
    CHECK(result.bytes_after < result.bytes_before);
    for (std::size_t head = 0; head < kv_heads; ++head) {
      CHECK(cache.layer(2).length(head) == static_cast<std::size_t>(result.counts[head].length()));
      const bool keeps_eight =
          !std::holds_alternative<twilight>(policy) && !std::holds_alternative<tova>(policy);
      CHECK(is_part_of(cache.layer(2), model.cache.layer(2), head, keeps_eight ? 8 : 0));
    }
  }
}

TEST_CASE("CAKE's layers share one budget, earlier ones give up what they have too much") {
  const filled_model model;
  pruner prune(refreekv::policy::cake{.budget = 60, .window = window, .layers = layers},
               kv_heads * group, 2);
  kv_cache cache = model.cache;
  std::vector<std::size_t> first_lengths;
  for (std::size_t l = 0; l < layers; ++l) {
    prune.prune(l, model.queries[l], cache);
    first_lengths.push_back(cache.layer(l).length(0));
  }
  std::size_t total = 0;
  for (std::size_t l = 0; l < layers; ++l) {
    total += cache.layer(l).length(0);
    CHECK(cache.layer(l).length(0) <= first_lengths[l]);
    for (std::size_t head = 0; head < kv_heads; ++head) {
      CHECK(cache.layer(l).length(head) == cache.layer(l).length(0));
      CHECK(is_part_of(cache.layer(l), model.cache.layer(l), head, window));
    }
  }
  CHECK(cache.layer(0).length(0) < first_lengths[0]);
  CHECK(total <= layers * 60);
  CHECK(total >= layers * 60 - layers * layers);  // what whole numbers lose
  CHECK_THROWS(prune.prune(0, model.queries[0], cache.layer(0)));
}
