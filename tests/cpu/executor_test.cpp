// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/executor.hpp"

#include <algorithm>
#include <vector>

#include "catch.hpp"

using namespace refreekv;

TEST_CASE("a pool calls each worker once in every run", "[cpu][executor]") {
  for (const int threads : {-1, 1, 2, 5}) {
    thread_pool pool(threads);
    REQUIRE(pool.workers() == std::max(1, threads));
    std::vector<int> calls(static_cast<std::size_t>(pool.workers()));
    for (int round = 1; round <= 1000; ++round) {
      pool.run([&](int w) { ++calls[static_cast<std::size_t>(w)]; });
      REQUIRE(calls == std::vector<int>(calls.size(), round));
    }
  }
}

TEST_CASE("a pool that was never used ends", "[cpu][executor]") { thread_pool pool(4); }

TEST_CASE("for_each_item visits each item once, contiguous items on one worker",
          "[cpu][executor]") {
  thread_pool pool(3);
  for (const index_t items : {0, 1, 2, 3, 4, 100}) {
    std::vector<int> worker_of(static_cast<std::size_t>(items), -1), visits(worker_of.size());
    for_each_item(pool, items, [&](int w, index_t i) {
      visits[static_cast<std::size_t>(i)] += 1;
      worker_of[static_cast<std::size_t>(i)] = w;
    });
    CHECK(std::is_sorted(worker_of.begin(), worker_of.end()));
    CHECK(visits == std::vector<int>(visits.size(), 1));
  }
  single_thread alone;
  index_t sum = 0;
  for_each_item(alone, 10, [&](int, index_t i) { sum += i; });
  CHECK(sum == 45);
}
