// SPDX-License-Identifier: Apache-2.0
// No block has two owners that do not know of each other, and none is lost.
#include "block_manager.hpp"

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <stdexcept>

#include "catch.hpp"

using namespace paged;

TEST_CASE("blocks are taken all or none") {
  block_manager manager(5);
  CHECK(manager.free_blocks() == 5);
  CHECK_FALSE(manager.allocate(6));
  CHECK(manager.free_blocks() == 5);
  const auto four = manager.allocate(4);
  REQUIRE(four);
  CHECK(std::set(four->begin(), four->end()).size() == 4);
  CHECK(std::all_of(four->begin(), four->end(), [](block_id b) { return 0 <= b && b < 5; }));
  CHECK_FALSE(manager.allocate(2));
  CHECK(manager.free_blocks() == 1);
  CHECK(manager.allocate(0)->empty());
  const auto last = manager.allocate(1);
  REQUIRE(last);
  CHECK(std::count(four->begin(), four->end(), last->front()) == 0);
  CHECK_FALSE(manager.allocate(1));
}

TEST_CASE("a block is free once its last owner has released it") {
  block_manager manager(2);
  const block_id block = manager.allocate(1)->front();
  manager.share(block);
  CHECK(manager.owners(block) == 2);
  manager.release(block);
  CHECK(manager.free_blocks() == 1);
  CHECK(manager.owners(block) == 1);
  manager.release(block);
  CHECK(manager.free_blocks() == 2);
  CHECK(manager.owners(block) == 0);
}

TEST_CASE("a block that nobody owns is neither released nor shared") {
  block_manager manager(3);
  const block_id block = manager.allocate(1)->front();
  manager.release(block);
  for (const block_id nobodys : {block, block_id{-1}, block_id{3}}) {
    CHECK_THROWS_AS(manager.release(nobodys), std::logic_error);
    CHECK_THROWS_AS(manager.share(nobodys), std::logic_error);
  }
  CHECK(manager.free_blocks() == 3);
  const auto all = manager.allocate(3);
  REQUIRE(all);
  CHECK(std::set(all->begin(), all->end()).size() == 3);
}

TEST_CASE("whatever happens, each block is free or has as many owners as were given") {
  std::mt19937 random(11);
  block_manager manager(40);
  std::map<block_id, std::size_t> owners;
  for (int step = 0; step < 5000; ++step) {
    if (random() % 2 == 0) {
      const std::size_t count = random() % 6;
      const auto blocks = manager.allocate(count);
      REQUIRE(blocks.has_value() == (count <= 40 - owners.size()));
      if (!blocks) continue;
      REQUIRE(blocks->size() == count);
      for (const block_id block : *blocks) REQUIRE(owners.emplace(block, 1).second);
    } else if (!owners.empty()) {
      const auto chosen = std::next(owners.begin(), static_cast<int>(random() % owners.size()));
      if (random() % 3 == 0) {
        manager.share(chosen->first);
        ++chosen->second;
      } else {
        manager.release(chosen->first);
        if (--chosen->second == 0) owners.erase(chosen);
      }
    }
    REQUIRE(manager.free_blocks() == 40 - owners.size());
    for (block_id block = 0; block < 40; ++block) {
      const auto entry = owners.find(block);
      REQUIRE(manager.owners(block) == (entry == owners.end() ? 0 : entry->second));
    }
  }
}
