// SPDX-License-Identifier: Apache-2.0
#include "refreekv/decision/position_ranking.hpp"

#include <set>

#include "catch.hpp"

using namespace refreekv;

TEST_CASE("ranks run over sinks, then from the newest token to the oldest", "[ranking]") {
  const position_ranking ranking(8, 3);
  const std::vector<index_t> expected{0, 1, 2, 7, 6, 5, 4, 3};
  for (index_t rank = 0; rank < 8; ++rank) {
    CHECK(ranking.position(rank) == expected[static_cast<std::size_t>(rank)]);
  }
}

TEST_CASE("the best ranked are what best() keeps", "[ranking]") {
  for (index_t tokens = 0; tokens < 12; ++tokens) {
    for (index_t sinks = 0; sinks < 14; ++sinks) {
      const position_ranking ranking(tokens, sinks);
      for (index_t count = 0; count < 15; ++count) {
        const kept_range kept = ranking.best(count);
        std::set<index_t> expected;
        const index_t kept_ranks = std::min(std::max({count, ranking.sinks(), index_t{1}}), tokens);
        for (index_t rank = 0; rank < kept_ranks; ++rank) expected.insert(ranking.position(rank));
        CAPTURE(tokens, sinks, count);
        REQUIRE(kept.length() == static_cast<index_t>(expected.size()));
        for (index_t t = 0; t < tokens; ++t) REQUIRE(kept.keeps(t) == (expected.count(t) == 1));
        REQUIRE(kept.sinks <= kept.cut);
        REQUIRE(kept.cut <= kept.tokens);
      }
      CHECK(ranking.all().length() == tokens);
      CHECK(ranking.all().dropped() == 0);
    }
  }
}
