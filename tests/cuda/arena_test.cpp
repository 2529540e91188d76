// SPDX-License-Identifier: Apache-2.0
// The heap of the tests that run on a device.
#include "cuda/device/arena.hpp"

#include <algorithm>
#include <map>
#include <memory>
#include <random>

#include "catch.hpp"

namespace {

constexpr std::size_t bytes = std::size_t{1} << 20;

struct free_aligned {
  void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{arena::page}); }
};

}  // namespace

TEST_CASE("blocks of an arena are aligned, apart, and taken again", "[arena]") {
  const std::unique_ptr<std::byte, free_aligned> memory(
      static_cast<std::byte*>(::operator new(bytes, std::align_val_t{arena::page})));
  arena heap;
  CHECK(!heap.open());
  CHECK(!heap.holds(memory.get()));
  heap.begin(memory.get(), bytes);
  REQUIRE(heap.open());
  std::mt19937 random(1);
  std::map<std::byte*, std::size_t> taken;
  for (int i = 0; i < 20000; ++i) {
    if (random() % 2 == 0 && !taken.empty()) {
      const auto any =
          std::next(taken.begin(), static_cast<std::ptrdiff_t>(random() % taken.size()));
      heap.give(any->first);
      taken.erase(any);
      continue;
    }
    const std::size_t wanted = random() % (std::size_t{1} << random() % 15);
    auto* const block = static_cast<std::byte*>(heap.take(wanted));
    if (block == nullptr) continue;  // no room
    const std::size_t aligned =
        std::min(std::bit_ceil(std::max<std::size_t>(wanted, 16)), arena::page);
    REQUIRE(reinterpret_cast<std::uintptr_t>(block) % aligned == 0);
    REQUIRE(heap.holds(block));
    REQUIRE(block + wanted <= memory.get() + bytes);
    const auto [at, is_new] = taken.emplace(block, wanted);
    REQUIRE(is_new);
    if (at != taken.begin()) REQUIRE(std::prev(at)->first + std::prev(at)->second <= block);
    if (std::next(at) != taken.end()) REQUIRE(block + wanted <= std::next(at)->first);
    std::fill_n(block, wanted, std::byte{0xA5});
  }
  CHECK(heap.peak() <= bytes);
  CHECK(heap.take(bytes) == nullptr);
  CHECK(heap.take(~std::size_t{0}) == nullptr);
  heap.close();
  CHECK(!heap.open());
}
