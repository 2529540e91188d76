// SPDX-License-Identifier: Apache-2.0
// The device's elements as floats, and keys of 8 bits with scales.
#include "refreekv/cuda/block/element.hpp"

#include <cmath>

#include "layouts.hpp"
#include "reference.hpp"
#include "refreekv/cache/scaled_keys.hpp"
#include "selection.hpp"

using namespace refreekv;
using cuda_detail::unpack;
using cuda_detail::vector16;
using cuda_detail::widen;

namespace {

/// e4m3 by its definition.
double e4m3(unsigned bits) {
  const unsigned exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<double>::quiet_NaN();
  const double magnitude = exponent == 0
                               ? mantissa * std::exp2(-9)
                               : (8 + mantissa) * std::exp2(static_cast<int>(exponent) - 10);
  return (bits & 128) != 0 ? -magnitude : magnitude;
}

/// As the elements of 8 bits are found in a test's random keys.
fp8_e4m3_bits nearest(double x, fp8_e4m3_bits*) {
  static const std::vector<double> values = [] {
    std::vector<double> all;
    for (unsigned bits = 0; bits < 256; ++bits) all.push_back(e4m3(bits));
    return all;
  }();
  std::size_t best = 0;
  for (std::size_t bits = 0; bits < 256; ++bits) {
    if (std::abs(values[bits] - x) < std::abs(values[best] - x)) best = bits;
  }
  return {static_cast<std::uint8_t>(best)};
}
std::int8_t nearest(double x, std::int8_t*) { return static_cast<std::int8_t>(std::rint(x)); }

template <class T>
bool same(float a, T b) {
  return a == static_cast<float>(b) || (std::isnan(a) && std::isnan(static_cast<float>(b)));
}

/// 16 bytes of every element there is, in turn, as one by one.
template <class T>
void check_fragments() {
  constexpr std::size_t width = std::size_t{cuda_detail::fragment_elements<T>};
  random_source random(base_seed());
  for (int round = 0; round < 5000; ++round) {
    vector16 bits;
    for (std::uint32_t& word : bits.words) word = static_cast<std::uint32_t>(random.engine()());
    T elements[width];
    std::memcpy(elements, &bits, sizeof bits);
    float floats[width];
    unpack<T>(bits, floats);
    for (std::size_t i = 0; i < width; ++i) REQUIRE(same(floats[i], widen(elements[i])));
  }
}

}  // namespace

TEST_CASE("every element of 8 and 16 bits has its value", "[cuda]") {
  for (unsigned bits = 0; bits < 256; ++bits) {
    const auto byte = static_cast<std::uint8_t>(bits);
    REQUIRE(same(widen(fp8_e4m3_bits{byte}), e4m3(bits)));
    REQUIRE(widen(static_cast<std::int8_t>(byte)) == static_cast<std::int8_t>(byte));
  }
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const auto word = static_cast<std::uint16_t>(bits);
    REQUIRE(same(widen(f16_bits{word}), std::bit_cast<Eigen::half>(word)));
    REQUIRE(same(widen(bf16_bits{word}), std::bit_cast<Eigen::bfloat16>(word)));
  }
}

TEST_CASE("a vector of elements is its elements", "[cuda]") {
  check_fragments<float>();
  check_fragments<f16_bits>();
  check_fragments<bf16_bits>();
  check_fragments<fp8_e4m3_bits>();
  check_fragments<std::int8_t>();
}

TEMPLATE_TEST_CASE("keys of 8 bits with scales decide as the keys that they stand for", "[cuda]",
                   fp8_e4m3_bits, std::int8_t) {
  for (unsigned seed = base_seed(); seed < base_seed() + 25; ++seed) {
    INFO("REFREEKV_SEED=" << seed);
    random_source random(seed);
    const index_t heads = 2, dim = random.one_of<index_t>({16, 64, 128, 24, 5});
    std::vector<position_t> lengths{static_cast<position_t>(random.between(1, 600)),
                                    static_cast<position_t>(random.between(1, 600))};
    problem p(heads, random.one_of<index_t>({1, 4, 7}), dim, random.one_of<index_t>({1, 3}),
              lengths);
    fill(p, random);
    const index_t longest = p.keys.longest();
    std::vector<TestType> rows(size(2 * heads * longest * dim));
    std::vector<float> scales(size(2 * heads * longest));
    const view<TestType, 4> row(rows.data(), {2, heads, longest, dim});
    const view<float, 4> scale(scales.data(), {2, heads, longest, 1});
    for (index_t s = 0; s < 2; ++s) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t t = 0; t < lengths[size(s)]; ++t) {
          float most = 0;
          for (index_t d = 0; d < dim; ++d) most = std::max(most, std::abs(p.key(s, h, t, d)));
          scale(s, h, t, 0) = most / 100;
          for (index_t d = 0; d < dim; ++d) {
            row(s, h, t, d) =
                nearest(double{p.key(s, h, t, d) / (most / 100)}, static_cast<TestType*>(nullptr));
            p.keys.at(s, h, t, d) = widen(row(s, h, t, d)) * (most / 100);
          }
        }
      }
    }
    const lengths_view<> length(lengths.data(), {2});
    const scaled_keys keys{dense(view<const TestType, 4>(row), length),
                           dense(view<const float, 4>(scale), length)};
    const policy::refreekv policy{.threshold = 0.1, .window = static_cast<count_t>(p.window)};
    const selection got = run_select(policy, divided<7>(), observe(p.query_view(), keys, p.info()));
    REQUIRE(got.status == status::ok);
    for (index_t s = 0; s < 2; ++s) {
      const auto expected = reference::decide(reference::attend(p, s), 0, p.q_heads(), policy);
      CHECK(reference::disagreement(got.at(s), expected, policy.threshold) == "");
    }
  }
}

TEST_CASE("scales of another shape are refused", "[cuda]") {
  std::vector<std::int8_t> rows(2 * 10 * 8);
  std::vector<float> scales(2 * 10 * 8);
  const dense keys(view<std::int8_t, 4>(rows.data(), {1, 2, 10, 8}));
  const auto with = [&](index_t heads, index_t tokens, index_t dim) {
    return scaled_keys{keys, dense(view(scales.data(), {1, heads, tokens, dim}))}.invalid();
  };
  CHECK(with(2, 10, 1) == nullptr);
  CHECK(with(1, 10, 1) != nullptr);
  CHECK(with(2, 9, 1) != nullptr);
  CHECK(with(2, 10, 2) != nullptr);
}
