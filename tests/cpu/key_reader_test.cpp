// SPDX-License-Identifier: Apache-2.0
// How keys in 8 and 4 bits become floats. tests/policy/packed_keys_test.cpp decides on them.
#include "refreekv/cpu/key_reader.hpp"

#include "packed_cache.hpp"

using namespace refreekv;

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
