// SPDX-License-Identifier: Apache-2.0
// Keys in 8 and 4 bits: ReFreeKV decides on the numbers that they mean, as the oracle does.
#include "oracle_check.hpp"
#include "packed_cache.hpp"
#include "ranked_selection.hpp"
#include "refreekv/cache/shard.hpp"
#include "refreekv/policy/all.hpp"

using namespace refreekv;

namespace {

/// What a policy decides.
template <class Policy, class Layer>
auto decide(const Policy& policy, const Layer& layer) {
  const auto exec = divided<2>();
  if constexpr (std::is_same_v<decision_of<Policy, host_memory>, kept_ranges<>>) {
    const selection s = run_select(policy, exec, layer);
    REQUIRE(s.status == status::ok);
    std::vector<position_t> cuts;  // losses differ in their last digits where scales are factors
    for (const kept_range& each : s.kept) cuts.push_back(each.cut);
    return cuts;
  } else {
    const ranked_selection s = run_ranked(policy, exec, layer);
    REQUIRE(s.status == status::ok);
    return s.kept;
  }
}

template <class Policy, class Layer>
concept decides_on = policy_for<Policy, decltype(divided<2>()), Layer>;

}  // namespace

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
    check_by_oracle(p, policy, refreekv::observe(p.query_view(), cache.keys(), p.info()));
  }
}

TEMPLATE_TEST_CASE("every policy decides on packed keys as on the floats they mean", "[packed]",
                   scaled_cache<std::int8_t>, scaled_cache<fp8_e4m3_bits>, block_cache<q8_0_block>,
                   block_cache<q4_0_block>, int4_cache) {
  random_source random(base_seed());
  INFO("REFREEKV_SEED=" << base_seed());
  problem p(2, 3, 64, 5, {700, 0, 40, 261});
  fill(p, random);
  TestType cache(p);
  const dense_cache<float> floats(p.keys);
  const auto packed = observe(p.query_view(), cache.keys(), p.info());
  const auto plain = observe(p.query_view(), floats.source(), p.info());
  int policies = 0;
  const auto check = [&](auto policy) {
    using policy_type = decltype(policy);
    if constexpr (decides_on<policy_type, std::remove_cvref_t<decltype(plain)>>) {
      INFO(policy_type::name);
      if constexpr (requires { policy.budget; }) policy.budget = 40;
      if constexpr (requires { policy.recent = 3u; }) policy.recent = 3u;
      if constexpr (requires { policy.window = 5u; }) policy.window = 5u;
      CHECK(decide(policy, packed) == decide(policy, plain));
      ++policies;
    }
  };
  std::apply([&](const auto&... policy) { (check(policy), ...); }, all_policies{});
  CHECK(policies >= 8);  // all but faithful, which reads values, and cake, which has state
}

TEMPLATE_TEST_CASE("shards of packed keys decide as the whole", "[packed]",
                   scaled_cache<std::int8_t>, block_cache<q8_0_block>, int4_cache) {
  random_source random(base_seed());
  INFO("REFREEKV_SEED=" << base_seed());
  problem p(2, 2, 64, 3, {900, 0, 261});
  fill(p, random);
  TestType cache(p);
  // One rank has all tokens, in two parts.
  const std::vector<token_range> parts{{0, 516}, {516, 900}, {0, 0}, {0, 0}, {0, 260}, {260, 261}};
  const shard keys(cache.keys(), view(parts.data(), {3, 2}), {p.lengths.data(), {3}}, 900);
  const auto alone = [](std::uint32_t*, index_t) { return status::ok; };
  for (const count_t window : {1u, 3u}) {
    const policy::refreekv policy{.threshold = 0.1, .window = window};
    const selection whole =
        run_select(policy, divided<2>(), observe(p.query_view(), cache.keys(), p.info()));
    const selection split =
        run_select(policy, divided<2>(), observe(p.query_view(), keys, p.info()), 0, alone);
    REQUIRE(split.status == status::ok);
    CHECK(split.kept == whole.kept);
  }
}
