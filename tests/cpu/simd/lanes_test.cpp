// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/simd/lanes.hpp"

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "catch.hpp"

using namespace refreekv::cpu_detail;

namespace {

lanes counting(float first) {
  std::vector<float> x(lane_count);
  std::iota(x.begin(), x.end(), first);
  return load(x.data());
}

}  // namespace

TEST_CASE("lanes go to memory and back", "[cpu][lanes]") {
  const lanes x = counting(1);
  std::vector<float> out(lane_count + 2, -7);
  store(x, out.data() + 1);  // not aligned
  CHECK(out.front() == -7);
  CHECK(out.back() == -7);
  for (int i = 0; i < lane_count; ++i)
    CHECK(out[static_cast<std::size_t>(i + 1)] == static_cast<float>(1 + i));
  const lanes same = splat(-0.0f);
  CHECK(std::signbit(same[lane_count - 1]));
}

TEST_CASE("a shuffle takes lanes of both operands", "[cpu][lanes]") {
  const lanes a = counting(0), b = counting(lane_count);
  const auto index = [](int i) { return (7 * i + 3) % (2 * lane_count); };
  const lanes x = shuffle(a, b, index);
  for (int i = 0; i < lane_count; ++i) CHECK(x[i] == static_cast<float>(index(i)));
}

TEST_CASE("lanes are summed and compared across", "[cpu][lanes]") {
  CHECK(sum_of(counting(1)) == lane_count * (lane_count + 1) / 2);
  for (int peak = 0; peak < lane_count; ++peak) {
    std::vector<float> x(lane_count, -3);
    x[static_cast<std::size_t>(peak)] = 5;
    CHECK(largest_of(load(x.data())) == 5);
  }
}

TEST_CASE("the larger of two keeps NaN of the first alone", "[cpu][lanes]") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(larger(splat(1), splat(2))[0] == 2);
  CHECK(larger(splat(2), splat(1))[0] == 2);
  CHECK(std::isnan(larger(splat(nan), splat(1))[0]));
  CHECK(larger(splat(1), splat(nan))[0] == 1);
}

TEST_CASE("powers of two are made of differences", "[cpu][lanes]") {
  for (const float a : {-2000000.0f, -62.0f, 0.0f, 1.0f, 77.0f, 2000000.0f}) {
    for (const float d : {-126.0f, -62.0f, -1.0f, 0.0f, 3.0f, 127.0f}) {
      const lanes power =
          two_to_the_difference(splat(a + d + integer_shift), splat(a + integer_shift));
      CHECK(power[lane_count - 1] == std::ldexp(1.0f, static_cast<int>(d)));
    }
  }
}
