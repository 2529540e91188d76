// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/simd/exp.hpp"

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "catch.hpp"

using namespace refreekv::cpu_detail;

namespace {

/// exp(x) / 2^exponent for all of x, in whole registers.
std::vector<float> values_of(std::vector<float> x, float exponent) {
  const std::size_t count = x.size();
  x.resize((count + lane_count - 1) / lane_count * lane_count);
  for (std::size_t i = 0; i < x.size(); i += lane_count) {
    store(exponential(load(x.data() + i), splat(exponent + integer_shift)), x.data() + i);
  }
  x.resize(count);
  return x;
}

}  // namespace

TEST_CASE("exp is within two units in the last place", "[cpu][exp]") {
  for (const float exponent : {0.0f, 1.0f, -37.0f, 1000.0f, -1000.0f}) {
    // From the lowest value to 2^50 units.
    std::vector<float> x;
    const double base = double{exponent} * std::log(2.0);
    for (std::uint32_t i = 0; i < 2000000; ++i) {
      x.push_back(static_cast<float>(base - 42.9 + 77.5 * i / 2000000.0));
    }
    if (exponent == 0) {
      for (std::uint32_t bits = 0; bits < 0x42280000u; bits += 97 * 13) {  // denormals too
        x.push_back(-std::bit_cast<float>(bits));
      }
    }
    const std::vector<float> got = values_of(x, exponent);
    double worst = 0;
    bool normal = true;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double exact = std::exp(double{x[i]} - base);
      const auto rounded = static_cast<float>(exact);
      const double ulp = std::nextafter(rounded, std::numeric_limits<float>::infinity()) - rounded;
      worst = std::max(worst, std::abs(double{got[i]} - exact) / ulp);
      normal = normal && std::fpclassify(got[i] * got[i]) == FP_NORMAL;
    }
    CAPTURE(exponent);
    CHECK(worst < 2);
    CHECK(normal);
  }
}

TEST_CASE("exp keeps NaN and takes infinity for one", "[cpu][exp]") {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float x : values_of({std::nanf(""), -std::nanf(""), inf}, 0)) CHECK(std::isnan(x));
}
