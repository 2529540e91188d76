// SPDX-License-Identifier: Apache-2.0
#include "refreekv/policy/pyramidkv.hpp"

#include "catch.hpp"
#include "problem.hpp"

using namespace refreekv;

namespace {

policy::pyramidkv exact(count_t budget, count_t window, count_t beta, count_t layers) {
  policy::pyramidkv policy{.budget = budget, .window = window, .beta = beta, .layers = layers};
  policy.step = policy::pyramid_step::exact;
  return policy;
}

/// Returns the number of tokens kept in a layer.
index_t kept(const policy::pyramidkv& policy, index_t layer, index_t tokens) {
  const token_quota quota = policy.quota(layer, tokens);
  REQUIRE(quota.ranked >= 0);
  const index_t recent = std::min(tokens, quota.recent);
  return std::min(tokens - recent, quota.ranked) + recent;
}

/// Checks that a layer's quota is less than one token off the line from the first to the last layer
/// of the published method.
void check_line(const policy::pyramidkv& policy, index_t layer, index_t tokens) {
  const index_t mean = policy.budget.of(tokens) - policy.window, others = tokens - policy.window;
  const index_t first = std::min(2 * mean - mean / policy.beta, others), last = 2 * mean - first;
  const index_t steps = index_t{policy.layers} - 1, ranked = policy.quota(layer, tokens).ranked;
  REQUIRE(ranked <= others);
  if (steps == 0) {
    REQUIRE(ranked == mean);
  } else {
    REQUIRE(std::abs((ranked - first) * steps + layer * (first - last)) < steps);
  }
}

}  // namespace

TEST_CASE("an exact pyramid holds layers * budget tokens, on the line", "[pyramidkv]") {
  random_source random(base_seed());
  INFO("REFREEKV_SEED=" << base_seed());
  int clipped = 0, lines = 0;
  for (int i = 0; i < 20000; ++i) {
    const index_t budget = random.between(0, random.one_of({20, 300, 5000}));
    const index_t window = random.between(1, random.one_of({3, 40}));
    const index_t beta = random.one_of({1, 2, 3, 20, 1000}), layers = random.between(1, 50);
    // About a third of the lengths are near the length below which the first layer would keep more
    // tokens than the prompt has.
    const index_t tokens =
        random.chance(0.3) ? std::max<index_t>(0, 2 * (budget - window) + random.between(0, window))
                           : random.between(0, budget * 3 + 20);
    const auto policy = exact(static_cast<count_t>(budget), static_cast<count_t>(window),
                              static_cast<count_t>(beta), static_cast<count_t>(layers));
    CAPTURE(budget, window, beta, layers, tokens);
    index_t sum = 0;
    for (index_t l = 0; l < layers; ++l) sum += kept(policy, l, tokens);
    if (tokens <= budget) {
      REQUIRE(sum == layers * tokens);
      continue;
    }
    if (budget < window) {  // the window stays whatever the budget is
      REQUIRE(sum == layers * std::min(tokens, window));
      continue;
    }
    REQUIRE(sum == layers * budget);
    if (tokens < 2 * (budget - window)) continue;  // every layer keeps the mean

    for (index_t l = 0; l < layers; ++l) {
      check_line(policy, l, tokens);
      if (l > 0) REQUIRE(policy.quota(l, tokens).ranked <= policy.quota(l - 1, tokens).ranked + 1);
    }
    const index_t mean = budget - window;
    ++(2 * mean - mean / beta > tokens - window ? clipped : lines);
  }
  CHECK(clipped > 500);
  CHECK(lines > 1000);
}

TEST_CASE("an exact pyramid has whole steps where the line has", "[pyramidkv]") {
  // Besides the window, the mean layer keeps 6 - 2 = 4 tokens: 7 in the first of three layers, 1
  // in the last.
  const auto policy = exact(6, 2, 4, 3);
  for (const index_t layer : {0, 1, 2}) CHECK(policy.quota(layer, 12).ranked == 7 - 3 * layer);
  CHECK(exact(6, 2, 4, 1).quota(0, 12).ranked == 4);
}

TEST_CASE("an exact pyramid of the largest numbers does not overflow", "[pyramidkv]") {
  const index_t tokens = max_count;
  for (const count_t budget : {max_count / 2, max_count / 3, count_t{1000}}) {
    for (const count_t layers : {max_count, max_count - 1, count_t{1} << 20}) {
      for (const count_t beta : {count_t{1}, count_t{20}, max_count}) {
        const auto policy = exact(budget, 1, beta, layers);
        CAPTURE(budget, layers, beta);
        for (const index_t layer : {index_t{0}, index_t{1}, index_t{layers} / 3,
                                    index_t{layers} / 2, index_t{layers} - 1}) {
          check_line(policy, layer, tokens);
        }
      }
    }
  }
  CHECK(exact(max_count - 1, 1, 20, max_count).quota(7, tokens).ranked == tokens - 2);  // the mean
}

TEST_CASE("the published pyramid holds more than its budget", "[pyramidkv]") {
  index_t sum = 0, line = 0;
  for (index_t l = 0; l < 32; ++l) {
    sum += kept(policy::pyramidkv{.budget = 64}, l, 8000);
    line += kept(exact(64, 8, 20, 32), l, 8000);
  }
  CHECK(sum == 32 * 71 + 16);  // 71.5 tokens on average
  CHECK(line == 32 * 64);
}
