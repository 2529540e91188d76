// SPDX-License-Identifier: Apache-2.0
#include "refreekv/policy/snapkv.hpp"

#include "ranked_selection.hpp"

using namespace refreekv;

namespace {

using positions = std::vector<position_t>;

/// Returns the decision with a window of one row. attention: [q_head, token] of the last row. Each
/// query head is a KV head.
ranked_selection kept_by(const std::vector<float>& attention, index_t heads, token_budget budget,
                         double head_floor) {
  const auto tokens = static_cast<index_t>(attention.size()) / heads;
  const auto layer = observe_rows(view(attention.data(), {1, 1, heads, tokens}), heads);
  const policy::snapkv policy{budget, 1, {pool_kind::max, 1}, head_floor};
  ranked_selection kept = run_ranked(policy, divided<2>(), layer);
  REQUIRE(kept.status == status::ok);
  return kept;
}

}  // namespace

TEST_CASE("KV heads share a layer's budget, but for the floor", "[snapkv]") {
  // Three of the four best tokens of all heads are the first head's. Numbers below are each head's
  // tokens before rounding, without the window.
  const std::vector<float> attention{0.30f, 0.25f, 0.20f, 0.15f, 0.00f, 0.10f,  //
                                     0.05f, 0.50f, 0.05f, 0.05f, 0.05f, 0.30f};
  const auto kept = [&](token_budget budget, double head_floor) {
    return kept_by(attention, 2, budget, head_floor).kept;
  };
  using heads = std::vector<positions>;
  CHECK(kept(3, 0) == heads{{0, 1, 2, 5}, {1, 5}});
  CHECK(kept(3, 0.2) == heads{{0, 1, 2, 5}, {1, 5}});  // 2.8 and 1.2
  CHECK(kept(3, 0.5) == heads{{0, 1, 5}, {0, 1, 5}});  // 2.5 and 1.5: both rounded to the even 2
  CHECK(kept(3, 0.6) == heads{{0, 1, 5}, {0, 1, 5}});  // 2.4 and 1.6
  CHECK(kept(3, 1) == heads{{0, 1, 5}, {0, 1, 5}});
  CHECK(kept(4, 0) == heads{{0, 1, 2, 3, 5}, {0, 1, 5}});     // 4 and 2
  CHECK(kept(4, 0.25) == heads{{0, 1, 2, 3, 5}, {0, 1, 5}});  // 3.75 and 2.25
  CHECK(kept(4, 0.75) == heads{{0, 1, 2, 5}, {0, 1, 2, 5}});  // 3.25 and 2.75
  for (const double head_floor : {0.0, 0.2, 1.0}) {
    CHECK(kept(0, head_floor) == heads{{5}, {5}});
    CHECK(kept(1, head_floor) == heads{{5}, {5}});
    CHECK(kept(6, head_floor) == heads{{0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5}});
  }
}

TEST_CASE("of equal scores the lower head has the first ones", "[snapkv]") {
  const std::vector<float> attention(3 * 8, 0.125f);
  const auto counts = [&](token_budget budget, double head_floor) {
    const ranked_selection kept = kept_by(attention, 3, budget, head_floor);
    for (index_t h = 0; h < 3; ++h) {
      const auto count = static_cast<position_t>(kept.at(0, h).size());
      for (position_t i = 0; i < count; ++i) {
        CHECK(kept.at(0, h)[size(i)] == (i + 1 < count ? i : 7));
      }
    }
    return std::vector<std::size_t>{kept.at(0, 0).size(), kept.at(0, 1).size(),
                                    kept.at(0, 2).size()};
  };
  using numbers = std::vector<std::size_t>;
  CHECK(counts(5, 0) == numbers{8, 6, 1});     // 12 of 21 tokens: 7, 5 and 0
  CHECK(counts(5, 0.5) == numbers{7, 5, 3});   // 5.5 rounded to 6, 4.5 to 4, and 2
  CHECK(counts(5, 0.75) == numbers{6, 5, 4});  // 4.75, 4.25 and 3
  CHECK(counts(5, 1) == numbers{5, 5, 5});
}

TEST_CASE("a KV head that has all it could keep is looked at, too", "[snapkv]") {
  std::vector<float> attention(2 * 6, 0.01f);
  for (int t = 0; t < 5; ++t) attention[size(t)] = 0.5f;
  CHECK(kept_by(attention, 2, 4, 0).kept == std::vector<positions>{{0, 1, 2, 3, 4, 5}, {0, 5}});
  for (const int spoilt : {2, 6 + 2}) {
    const float was =
        std::exchange(attention[size(spoilt)], std::numeric_limits<float>::quiet_NaN());
    const ranked_selection kept = kept_by(attention, 2, 4, 0);
    for (const kept_tokens& head : kept.counts) CHECK(head == kept_tokens{6, 6, true});
    attention[size(spoilt)] = was;
  }
}

TEST_CASE("one KV head has nobody to share with", "[snapkv]") {
  random_source random(base_seed());
  problem p(1, 3, 8, 4, {300, 5, 0, 77, 4, 1});
  fill(p, random);
  const dense_cache<float> keys(p.keys);
  const auto layer = observe(p.query_view(), keys.source(), p.info());
  const policy::snapkv alone{.budget = 40, .window = 4};
  const ranked_selection expected = run_ranked(alone, divided<1>(), layer);
  for (const double head_floor : {0.0, 0.1, 0.2, 0.7}) {
    policy::snapkv policy = alone;
    policy.head_floor = head_floor;
    CHECK(run_ranked(policy, divided<1>(), layer) == expected);
  }
}
