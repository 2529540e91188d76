// SPDX-License-Identifier: Apache-2.0
// Keys in 8 and 4 bits: ReFreeKV decides on the numbers that they mean, as the oracle does.
#include "packed_cache.hpp"
#include "reference.hpp"
#include "selection.hpp"

TEMPLATE_TEST_CASE("packed keys decide as the oracle does on their numbers", "[oracle]",
                   scaled_cache<std::int8_t>, scaled_cache<refreekv::fp8_e4m3_bits>,
                   block_cache<refreekv::q8_0_block>, block_cache<refreekv::q4_0_block>,
                   int4_cache) {
  const unsigned first = base_seed();
  for (unsigned seed = first; seed < first + affordable(500); ++seed) {
    random_source random(seed);
    problem p = packable_problem<TestType>(random);
    const refreekv::policy::refreekv policy = random_rule(random, p.window);
    INFO("REFREEKV_SEED=" << seed << " dim " << p.head_dim << " group " << p.group << " window "
                          << policy.window << " sinks " << policy.sinks);
    TestType cache(p);
    const auto layer = refreekv::observe(p.query_view(), cache.keys(), p.info());
    const selection one = run_select(policy, divided<1>(), layer);
    REQUIRE(one.status == refreekv::status::ok);
    const selection seven = run_select(policy, divided<7>(), layer);
    const index_t heads_of_cut = p.q_heads() / std::max<index_t>(one.groups, 1);
    for (index_t s = 0; s < p.sequences(); ++s) {
      const auto rows = reference::attend(p, s);
      for (index_t g = 0; g < one.groups; ++g) {
        const auto expected =
            reference::decide(rows, g * heads_of_cut, (g + 1) * heads_of_cut, policy);
        INFO("sequence " << s << " group " << g << " tokens " << rows.tokens);
        CHECK(reference::disagreement(one.at(s, g), expected, policy.threshold) == "");
        CHECK(seven.at(s, g) == one.at(s, g));
      }
    }
  }
}
