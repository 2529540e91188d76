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

TEST_CASE("items are visited once each, consecutive ones by one worker", "[cpu][executor]") {
  const thread_pool pool(3);
  for (const index_t items : {0, 1, 2, 3, 4, 100}) {
    for (const index_t elements : {0, 1 << 20}) {
      std::vector<int> worker_of(static_cast<std::size_t>(items), -1), visits(worker_of.size());
      for_each_item(pool, items, elements, [&](int w, index_t i) {
        visits[static_cast<std::size_t>(i)] += 1;
        worker_of[static_cast<std::size_t>(i)] = w;
      });
      CHECK(std::is_sorted(worker_of.begin(), worker_of.end()));
      CHECK(visits == std::vector<int>(visits.size(), 1));
      const bool shared = items > 1 && elements > 0;
      CHECK((items == 0 || worker_of.back() == 0) == !shared);
    }
  }
}

TEST_CASE("workers share items evenly", "[cpu][executor]") {
  const thread_pool pool(3);
  for (const index_t items : {0, 1, 2, 3, 100}) {
    std::vector<index_t> begins(3), ends(3);
    for_each_range(pool, items, [&](int w, index_t begin, index_t end) {
      begins[static_cast<std::size_t>(w)] = begin;
      ends[static_cast<std::size_t>(w)] = end;
    });
    index_t last = 0;
    for (std::size_t w = 0; w < 3; ++w) {
      if (ends[w] == 0) continue;  // had nothing to do
      CHECK(begins[w] == last);
      CHECK(ends[w] > begins[w]);
      CHECK(ends[w] - begins[w] <= items / 3 + 1);
      last = ends[w];
    }
    CHECK(last == items);
  }
}
