// SPDX-License-Identifier: Apache-2.0
// On the CPU keys in 8 and 4 bits are unpacked to floats, so every policy decides on them as on a
// cache of these floats, bit for bit.
#include "refreekv/cpu/key_reader.hpp"

#include "packed_cache.hpp"
#include "ranked_selection.hpp"
#include "refreekv/policy/all.hpp"
#include "selection.hpp"

using namespace refreekv;

namespace {

/// What a policy decides, or nothing for one that needs more than keys and queries.
template <class Policy, class Layer>
auto decide(const Policy& policy, const Layer& layer) {
  const auto exec = divided<2>();
  if constexpr (std::is_same_v<decision_of<Policy, host_memory>, kept_ranges<>>) {
    const selection s = run_select(policy, exec, layer);
    REQUIRE(s.status == status::ok);
    return s.kept;
  } else {
    const ranked_selection s = run_ranked(policy, exec, layer);
    REQUIRE(s.status == status::ok);
    return s.kept;
  }
}

template <class Policy, class Layer>
concept decides_on = policy_for<Policy, cpu_backend<thread_pool&>, Layer>;

}  // namespace

TEMPLATE_TEST_CASE("every policy decides on packed keys as on the floats they mean", "[cpu]",
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

TEST_CASE("a shard unpacks its own rows under the sequence's numbers", "[cpu]") {
  random_source random(base_seed());
  problem p(2, 1, 64, 1, {512});  // this rank's tokens
  fill(p, random);
  block_cache<q8_0_block> cache(p);
  const std::vector<token_range> parts{{0, 256}, {768, 1024}};
  const position_t total = 1024;
  const shard keys(cache.keys(), view(parts.data(), {1, 2}), {&total, {1}}, 1024);
  float local[8 * 64], whole[8 * 64];
  for (const index_t begin : {0, 248, 768, 1016}) {
    cpu_detail::unpack(keys, 0, 1, {begin, begin + 8}, whole);
    const index_t first = begin < 256 ? begin : begin - 512;
    cpu_detail::unpack(cache.keys(), 0, 1, {first, first + 8}, local);
    CHECK(std::equal(std::begin(local), std::end(local), whole));
    CHECK(whole[0] == p.keys.at(0, 1, first, 0));
  }
}

TEST_CASE("fp8 is exact for every code", "[cpu]") {
  for (unsigned code = 0; code < 256; ++code) {
    const float x = cpu_detail::widen(fp8_e4m3_bits{static_cast<std::uint8_t>(code)});
    const int exponent = static_cast<int>(code >> 3 & 15), mantissa = static_cast<int>(code & 7);
    INFO("code " << code);
    if (exponent == 15 && mantissa == 7) {
      CHECK(std::isnan(x));
      continue;
    }
    const float magnitude = exponent == 0
                                ? std::ldexp(static_cast<float>(mantissa), -9)
                                : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    CHECK(std::bit_cast<std::uint32_t>(x) ==
          std::bit_cast<std::uint32_t>((code & 0x80) != 0 ? -magnitude : magnitude));
  }
}

TEST_CASE("blocks are ggml's, byte for byte", "[cpu]") {
  static_assert(sizeof(q8_0_block) == 34 && sizeof(q4_0_block) == 18);
  // 0.5, and the codes -128 to 127, then 0.
  std::array<std::uint8_t, 34> eight{0x00, 0x38, 0x80, 0x7f, 0x01};
  q8_0_block block;
  std::memcpy(&block, eight.data(), sizeof block);
  float row[64];
  const auto decoded = [&](const auto& blocks) {
    cpu_detail::unpack(block_keys{dense(view(&blocks, {1, 1, 1, 1}))}, 0, 0, {0, 1}, row);
    return row;
  };
  decoded(std::as_const(block));
  CHECK(row[0] == -64);
  CHECK(row[1] == 63.5f);
  CHECK(row[2] == 0.5f);
  CHECK(row[3] == 0);
  // -2, byte 0 with codes 15 (dimension 0) and 1 (dimension 16), byte 15 with 8 and 0.
  std::array<std::uint8_t, 18> four{0x00, 0xc0, 0x1f};
  four[17] = 0x08;
  q4_0_block small;
  std::memcpy(&small, four.data(), sizeof small);
  decoded(std::as_const(small));
  CHECK(row[0] == -14);
  CHECK(row[16] == 14);
  CHECK(row[15] == 0);
  CHECK(row[31] == 16);
}
