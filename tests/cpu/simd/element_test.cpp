// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/simd/element.hpp"

#include <bit>
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
  // Whole registers, from any address.
  for (std::size_t first = 1; first + cpu_detail::lane_count <= all.size();
       first += cpu_detail::lane_count) {
    const cpu_detail::lanes some = cpu_detail::load(all.data() + first);
    for (int i = 0; i < cpu_detail::lane_count; ++i) {
      const float expected = cpu_detail::widen(all[first + static_cast<std::size_t>(i)]);
      if (std::isnan(expected)) {
        REQUIRE(std::isnan(some[i]));
      } else {
        REQUIRE(std::bit_cast<std::uint32_t>(float{some[i]}) ==
                std::bit_cast<std::uint32_t>(expected));
      }
    }
  }
}
