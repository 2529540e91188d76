// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/element.hpp"

#include <cmath>
#include <vector>

#include "catch.hpp"

using namespace refreekv;

TEMPLATE_TEST_CASE("widening is exact for every 16-bit number", "[cpu][element]", Eigen::half,
                   Eigen::bfloat16) {
  using bits = std::conditional_t<std::is_same_v<TestType, Eigen::half>, f16_bits, bf16_bits>;
  std::vector<TestType> all;
  for (std::uint32_t i = 0; i <= 0xffff; ++i) {
    const auto x = std::bit_cast<TestType>(static_cast<std::uint16_t>(i));
    const auto expected = static_cast<float>(x);
    const float wide = cpu_detail::widen(x);
    const float raw = cpu_detail::widen(bits{static_cast<std::uint16_t>(i)});
    if (std::isnan(expected)) {
      REQUIRE(std::isnan(wide));
      REQUIRE(std::isnan(raw));
    } else {
      REQUIRE(std::bit_cast<std::uint32_t>(wide) == std::bit_cast<std::uint32_t>(expected));
      REQUIRE(std::bit_cast<std::uint32_t>(raw) == std::bit_cast<std::uint32_t>(expected));
    }
    all.push_back(x);
  }
  const cpu_detail::lane_array some = cpu_detail::load(all.data() + 0x3c01);
  for (int i = 0; i < cpu_detail::lanes; ++i) {
    REQUIRE(some[i] == static_cast<float>(all[static_cast<std::size_t>(0x3c01 + i)]));
  }
}
