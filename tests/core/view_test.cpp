// SPDX-License-Identifier: Apache-2.0
#include "refreekv/core/view.hpp"

#include <array>

#include "catch.hpp"

using namespace refreekv;

TEST_CASE("a view without strides is contiguous, last axis fastest", "[view]") {
  std::array<int, 24> data{};
  for (int i = 0; i < 24; ++i) data[static_cast<std::size_t>(i)] = i;
  const view v(data.data(), {2, 3, 4});
  static_assert(std::is_same_v<decltype(v), const view<int, 3, host_memory>>);
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 3; ++j) {
      for (int k = 0; k < 4; ++k) CHECK(v(i, j, k) == (i * 3 + j) * 4 + k);
    }
  }
  CHECK(v.at(1, 2) == &data[20]);
  CHECK(v.extent(1) == 3);
  CHECK(v.stride(0) == 12);
}

TEST_CASE("strides are any axis order, padding, broadcast and direction", "[view]") {
  std::array<int, 6> data{0, 1, 2, 3, 4, 5};
  const view transposed(data.data(), {3, 2}, {1, 3});
  CHECK(transposed(2, 1) == 5);
  CHECK(transposed(1, 0) == 1);
  const view broadcast(data.data() + 4, {9, 2}, {0, 1});
  CHECK(broadcast(8, 1) == 5);
  const view backwards(data.data() + 5, {6}, {-1});
  CHECK(backwards(5) == 0);
}

TEST_CASE("a mutable view becomes a const one", "[view]") {
  int x = 7;
  const view<const int, 1> v = view(&x, {1});
  CHECK(v(0) == 7);
  static_assert(!std::is_convertible_v<view<const int, 1>, view<int, 1>>);
  static_assert(!std::is_convertible_v<view<int, 1, device_memory>, view<int, 1, host_memory>>);
}

TEST_CASE("offsets are 64 bits wide", "[view]") {
  // Addresses only: nothing is read.
  const auto base = reinterpret_cast<char*>(1);
  const view v(base, {1 << 20, 1 << 20});
  CHECK(v.at(70000, 5) - base == index_t{70000} * (1 << 20) + 5);
}

TEST_CASE("malformed views are recognised", "[view]") {
  int x = 0;
  CHECK_FALSE(view<int, 2>{}.malformed());
  CHECK_FALSE(view(&x, {1, 1}).malformed());
  CHECK_FALSE(view<int, 2>(nullptr, {0, 5}).malformed());
  CHECK(view<int, 2>(nullptr, {1, 5}).malformed());
  CHECK(view(&x, {-1, 1}).malformed());
  CHECK(view(&x, {0, -1}).malformed());
}
