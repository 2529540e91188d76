// SPDX-License-Identifier: Apache-2.0
#include "refreekv/core/workspace.hpp"

#include <vector>

#include "catch.hpp"

using namespace refreekv;

TEST_CASE("what an arena counts is what it carves, wherever memory starts", "[workspace]") {
  const auto take = [](arena& a) {
    std::vector<std::byte*> ends;
    const auto add = [&](auto* array, index_t n) {
      if (array != nullptr) {
        CHECK(reinterpret_cast<std::uintptr_t>(array) % arena::alignment == 0);
        ends.push_back(reinterpret_cast<std::byte*>(array));
        ends.push_back(reinterpret_cast<std::byte*>(array + n));
      }
    };
    add(a.array<char>(1), 1);
    add(a.array<double>(9), 9);
    add(a.array<float>(0), 0);
    add(a.array<int>(16), 16);
    return ends;
  };
  arena count;
  CHECK(take(count).empty());
  std::vector<std::byte> memory(count.bytes() + 64);
  for (std::size_t shift = 0; shift < 64; ++shift) {
    arena carve(memory.data() + shift);
    const std::vector<std::byte*> ends = take(carve);
    REQUIRE(ends.size() == 8);
    CHECK(std::is_sorted(ends.begin(), ends.end()));  // arrays do not overlap
    CHECK(ends.front() >= memory.data() + shift);
    CHECK(ends.back() <= memory.data() + shift + count.bytes());
    CHECK(carve.bytes() == count.bytes());
  }
}

TEST_CASE("sizes saturate instead of wrapping", "[workspace]") {
  constexpr index_t large = index_t{1} << 40;
  arena a;
  (void)a.array<double>(large, large);
  CHECK(a.bytes() == static_cast<std::size_t>(-1));
  (void)a.array<double>(large, large, large);
  (void)a.array<char>(1);
  CHECK(a.bytes() == static_cast<std::size_t>(-1));
  arena b;
  for (int i = 0; i < 3; ++i) (void)b.array<char>(large, index_t{1} << 23);
  CHECK(b.bytes() == static_cast<std::size_t>(-1));
  (void)b.array<double>(large, 0);
  CHECK(arena().bytes() == 0);
}

TEST_CASE("nothing taken needs nothing", "[workspace]") { CHECK(arena().bytes() == 0); }

TEST_CASE("a range of bytes is a workspace", "[workspace]") {
  std::vector<std::byte> bytes(10);
  const workspace<> w = bytes;
  CHECK(w.data == bytes.data());
  CHECK(w.bytes == 10);
  static_assert(!std::is_convertible_v<std::vector<std::byte>&, workspace<device_memory>>);
}
