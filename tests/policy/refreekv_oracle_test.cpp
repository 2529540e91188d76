// SPDX-License-Identifier: Apache-2.0
// Compares ReFreeKV, with every option, with the double-precision oracle on random problems.
#include "layouts.hpp"
#include "oracle_check.hpp"
#include "random_problem.hpp"

namespace {

constexpr unsigned problems_of_each_type = affordable(700);

}  // namespace

TEMPLATE_TEST_CASE("select agrees with the oracle on random problems", "[oracle]", float,
                   Eigen::half, refreekv::bf16_bits) {
  const unsigned first = base_seed();
  for (unsigned seed = first; seed < first + problems_of_each_type; ++seed) {
    random_source random(seed);
    problem p = random_problem(random);
    round_problem<TestType>(p);
    const refreekv::policy::refreekv policy = random_rule(random, p.window);
    INFO("REFREEKV_SEED=" << seed << " threshold " << policy.threshold << " sinks " << policy.sinks
                          << " window " << policy.window << " of " << p.window << " frobenius "
                          << (policy.average == refreekv::row_average::frobenius) << " full row "
                          << (policy.norm == refreekv::norm_scope::full_row) << " dim "
                          << p.head_dim << " group " << p.group << " soft cap " << p.soft_cap
                          << " sliding window " << p.sliding_window << " alibi "
                          << p.alibi_slopes.size() << " sinks " << p.sink_logits.size()
                          << " row counts " << p.row_counts.size() << " row ends "
                          << p.row_ends.size());
    std::vector<TestType> queries;
    for (const float q : p.queries) queries.push_back(to_element<TestType>(q));
    const refreekv::view q(queries.data(), {p.sequences(), p.window, p.q_heads(), p.head_dim});
    const auto check = [&](const auto& cache) {
      check_by_oracle(p, policy, refreekv::observe(q, cache.source(), p.info()));
      CHECK(cache.untouched());
    };
    switch (random.between(0, 5)) {
      case 0: check(any_layout(dense_cache<TestType>(p.keys))); break;
      case 1: check(any_layout(dense_cache<TestType>(p.keys, axis_order::token_head_dim))); break;
      case 2: check(any_layout(dense_cache<TestType>(p.keys, axis_order::head_dim_token))); break;
      case 3:
        check(any_layout(paged_cache<TestType>(p.keys, random.one_of<index_t>({1, 3, 16}))));
        break;
      case 4:
        check(any_layout(paged_cache<TestType, std::int64_t>(p.keys, 64, true, true, false)));
        break;
      default: check(any_layout(segmented_cache<TestType>(p.keys, seed))); break;
    }
  }
}

TEST_CASE("keys with a large common component keep their digits", "[oracle]") {
  // Like a model with a key bias: every logit is about 250.
  for (unsigned seed = base_seed(); seed < base_seed() + affordable(100); ++seed) {
    INFO("REFREEKV_SEED=" << seed);
    random_source random(seed);
    problem p(1, 4, 64, 1, {static_cast<position_t>(random.between(5, 600))});
    fill(p, random);
    for (index_t h = 0; h < 4; ++h) p.query(0, 0, h, 0) = 40;
    for (index_t t = 0; t < p.lengths[0]; ++t) p.keys.at(0, 0, t, 0) = 50;
    const dense_cache<float> keys(p.keys);
    const refreekv::policy::refreekv policy;
    const selection s = run_select(policy, divided<1>(),
                                   refreekv::observe(p.query_view(), keys.source(), p.info()));
    CHECK(reference::disagreement(s.at(0), reference::decide(reference::attend(p, 0), 0, 4, policy),
                                  policy.threshold) == "");
  }
}

TEST_CASE("decisions are right under soft caps of any size", "[oracle]") {
  random_source random(base_seed());
  INFO("REFREEKV_SEED=" << base_seed());
  problem p(2, 2, 8, 1, {300});
  fill(p, random);
  const dense_cache<float> keys(p.keys);
  for (const float cap : {0.0f, 1e-3f, 50.0f, 1e8f, 1e12f, 1e16f, 1e18f, 3e38f}) {
    p.soft_cap = cap;
    const refreekv::policy::refreekv policy{.threshold = 0.1};
    const selection s = run_select(policy, divided<1>(),
                                   refreekv::observe(p.query_view(), keys.source(), p.info()));
    CAPTURE(cap, s.at(0).cut);
    CHECK(reference::disagreement(s.at(0), reference::decide(reference::attend(p, 0), 0, 4, policy),
                                  policy.threshold) == "");
  }
}

TEST_CASE("ready rows agree with the oracle on random problems", "[oracle]") {
  const unsigned first = base_seed();
  for (unsigned seed = first; seed < first + affordable(300); ++seed) {
    random_source random(seed);
    problem p = random_problem(random);
    const refreekv::policy::refreekv policy = random_rule(random, p.window);
    INFO("REFREEKV_SEED=" << seed);
    const index_t tokens = p.keys.longest() + 2;
    std::vector<float> values(size(p.sequences() * p.window * p.q_heads() * tokens),
                              std::numeric_limits<float>::quiet_NaN());
    const refreekv::view a(values.data(), {p.sequences(), p.window, p.q_heads(), tokens});
    std::vector<reference::attention_rows> rows;
    for (index_t s = 0; s < p.sequences(); ++s) {
      rows.push_back(reference::attend(p, s));
      for (index_t h = 0; h < p.q_heads(); ++h) {
        for (index_t r = 0; r < p.window; ++r) {
          for (index_t t = 0; t < rows.back().tokens; ++t) {
            if (!p.sees(s, r, t)) continue;
            double& exact = rows.back().values[size((h * p.window + r) * rows.back().tokens + t)];
            a(s, r, h, t) = static_cast<float>(exact);
            exact = double{a(s, r, h, t)};
          }
        }
      }
    }
    const auto layer = refreekv::observe_rows(refreekv::view<const float, 4>(a), p.keys.kv_heads,
                                              {p.lengths.data(), {p.sequences()}}, p.info());
    const selection s = run_select(policy, divided<1>(), layer);
    REQUIRE(s.status == refreekv::status::ok);
    const index_t heads_of_cut = p.q_heads() / std::max<index_t>(s.groups, 1);
    for (index_t i = 0; i < p.sequences(); ++i) {
      for (index_t g = 0; g < s.groups; ++g) {
        const auto expected =
            reference::decide(rows[size(i)], g * heads_of_cut, (g + 1) * heads_of_cut, policy);
        INFO("sequence " << i << " group " << g << " tokens " << rows[size(i)].tokens);
        CHECK(reference::disagreement(s.at(i, g), expected, policy.threshold) == "");
      }
    }
  }
}
