// SPDX-License-Identifier: Apache-2.0
#include "refreekv/policy/tova.hpp"

#include "ranked_selection.hpp"
#include "ranks.hpp"

using namespace refreekv;

TEST_CASE("all query heads of the layer have one vote on each token", "[tova]") {
  // [q_head, token]: each KV head has two query heads. The first KV head alone would keep tokens 0
  // and 1.
  const std::vector<float> attention{0.50f, 0.30f, 0.05f, 0.05f, 0.10f,  //
                                     0.50f, 0.30f, 0.05f, 0.05f, 0.10f,  //
                                     0.00f, 0.10f, 0.00f, 0.80f, 0.10f,  //
                                     0.10f, 0.00f, 0.00f, 0.80f, 0.10f};
  const auto layer = observe_rows(view(attention.data(), {1, 1, 4, 5}), 2);
  const auto kept_by = [&](token_budget budget) {
    const ranked_selection kept = run_ranked(policy::tova{budget}, divided<2>(), layer);
    REQUIRE(kept.status == status::ok);
    CHECK(kept.at(0, 0) == kept.at(0, 1));
    return kept.at(0);
  };
  using positions = std::vector<position_t>;
  CHECK(kept_by(1) == positions{4});
  CHECK(kept_by(2) == positions{3, 4});
  CHECK(kept_by(3) == positions{0, 3, 4});
  CHECK(kept_by(4) == positions{0, 1, 3, 4});
  CHECK(kept_by(token_budget::share(0.6)) == positions{0, 3, 4});
  CHECK(kept_by(5) == positions{0, 1, 2, 3, 4});
}

TEST_CASE("ranks with a part of the heads each keep what one rank keeps", "[tova]") {
  constexpr index_t ranks = 2;
  random_source random(base_seed());
  problem p(2, 3, 16, 3, {300, 5, 0, 77});
  fill(p, random);
  const policy::tova policy{.budget = 40};
  const dense_cache<float> keys(p.keys);
  const ranked_selection one =
      run_ranked(policy, divided<1>(), observe(p.query_view(), keys.source(), p.info()));
  REQUIRE(one.status == status::ok);

  rank_group group(ranks);
  std::vector<std::vector<std::vector<position_t>>> got(ranks);  // [rank][sequence]
  run_ranks(ranks, [&](index_t rank) {
    const problem part = heads_of(p, rank, rank + 1);
    const dense_cache<float> own(part.keys);
    const auto layer = observe(part.query_view(), own.source(), part.info());
    std::vector<std::byte> scratch(workspace_size(policy, divided<1>(), layer));
    guarded_positions kept(layer.sequences(), 1, layer.capacity());
    if (select(policy, divided<1>(), layer, kept.kept(), scratch, head_link{&group, rank}) !=
        status::ok) {
      return;  // no assertion here: Catch2's are not thread-safe
    }
    for (index_t s = 0; s < layer.sequences(); ++s) {
      got[size(rank)].push_back(positions_of(kept.kept(), s, 0));
    }
  });
  for (index_t rank = 0; rank < ranks; ++rank) {
    REQUIRE(static_cast<index_t>(got[size(rank)].size()) == p.sequences());
    for (index_t s = 0; s < p.sequences(); ++s) CHECK(got[size(rank)][size(s)] == one.at(s, 0));
  }
}
