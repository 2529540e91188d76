// SPDX-License-Identifier: Apache-2.0
#include "refreekv/policy/cake.hpp"

#include "layouts.hpp"
#include "ranked_selection.hpp"

using namespace refreekv;

TEST_CASE("a prefill leaves the scores of sequences that show no row", "[cake]") {
  random_source random(base_seed());
  problem p(2, 2, 8, 8, {100, 100});
  fill(p, random);
  const dense_cache<float> cache(p.keys);
  const policy::cake policy{.budget = 20, .window = 8, .layers = 2};
  const index_t capacity = cache.source().shape().capacity;
  std::vector<float> scores(size(2 * 2 * capacity));
  std::vector<double> preferences(4, -1);
  const auto select = [&](std::vector<position_t> counts) {
    p.row_counts = std::move(counts);
    const auto layer = with_layers(observe(p.query_view(), cache.source(), p.info(0)),
                                   {.scores = {scores.data(), {2, 2, capacity}},
                                    .preferences = {preferences.data(), {2, 2}},
                                    .finished = 1});
    return run_ranked(policy, divided<2>(), layer);
  };
  const ranked_selection first = select({8, 8});
  REQUIRE(first.status == status::ok);
  REQUIRE(preferences[0] > 0);
  const std::vector<float> scores_before = scores;
  const std::vector<double> preferences_before = preferences;
  const ranked_selection second = select({0, 8});
  CHECK(scores == scores_before);
  CHECK(preferences == preferences_before);
  CHECK(second.counts[0].undecided);
  CHECK(second.at(0, 0).size() == 100);
  CHECK(second.at(1, 1) == first.at(1, 1));
}

TEST_CASE("a prefill of NaN alone has no preference, and is pruned in the next call", "[cake]") {
  random_source random(base_seed());
  problem p(1, 2, 8, 4, {60});
  fill(p, random);
  for (float& q : p.queries) q = std::numeric_limits<float>::quiet_NaN();
  const dense_cache<float> cache(p.keys);
  const policy::cake policy{.budget = 20, .window = 4, .layers = 2};
  const index_t capacity = cache.source().shape().capacity;
  std::vector<float> scores(size(capacity), 7.0f);
  std::vector<double> preferences{-1, -1};
  const cake_layers<> layers{.scores = {scores.data(), {1, 1, capacity}},
                             .preferences = {preferences.data(), {1, 2}},
                             .finished = 1};
  const auto prefill = with_layers(observe(p.query_view(), cache.source(), p.info(0)), layers);
  const ranked_selection kept = run_ranked(policy, divided<2>(), prefill);
  CHECK(kept.counts[0].undecided);
  CHECK(kept.at(0).size() == 60);
  CHECK(std::isnan(preferences[0]));
  const ranked_selection next =
      run_ranked(policy, divided<2>(), with_layers(observe(cache.source(), p.info(0)), layers));
  CHECK_FALSE(next.counts[0].undecided);
  CHECK(next.at(0).size() < 60);
}
