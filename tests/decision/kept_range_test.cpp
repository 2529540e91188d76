// SPDX-License-Identifier: Apache-2.0
#include "refreekv/decision/kept_range.hpp"

#include <limits>
#include <numeric>
#include <set>
#include <vector>

#include "catch.hpp"
#include "refreekv/decision/compaction.hpp"
#include "refreekv/decision/page_plan.hpp"

using namespace refreekv;

namespace {

/// Every range of up to 20 tokens.
template <class F>
void for_each_range(const F& f) {
  for (position_t tokens = 0; tokens <= 20; ++tokens) {
    for (position_t sinks = 0; sinks <= std::min<position_t>(tokens, 6); ++sinks) {
      for (position_t cut = sinks; cut <= tokens; ++cut) {
        CAPTURE(tokens, sinks, cut);
        f(kept_range{sinks, cut, tokens, 0, 0});
      }
    }
  }
}

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

}  // namespace

TEST_CASE("lengths of a kept range", "[retention]") {
  const kept_range kept{4, 90, 100, 0.01f, 0.2f};
  CHECK(kept.length() == 14);
  CHECK(kept.dropped() == 86);
  CHECK(kept.next_position() == 100);
  CHECK(kept.kept_fraction() == Approx(0.14));
  CHECK(kept_range{}.kept_fraction() == 1);
}

TEST_CASE("masks, bits and positions say the same", "[retention]") {
  for_each_range([](const kept_range& kept) {
    const index_t n = kept.tokens;
    std::vector<std::uint8_t> bytes(at(n + 1), 7), bits(at((n + 7) / 8 + 1), 0xA5);
    std::vector<float> additive(at(n + 1), 7);
    std::vector<std::int64_t> positions(at(kept.length() + 1), -7);
    std::vector<std::int32_t> offsets(3, -7);
    write_mask(kept, bytes.data(), 1, 0);
    write_mask(kept, additive.data(), 0.0f, -std::numeric_limits<float>::infinity());
    write_mask_bits(kept, bits.data());
    write_positions(&kept, 1, positions.data(), offsets.data());
    std::vector<std::int64_t> expected;
    for (index_t t = 0; t < n; ++t) {
      REQUIRE(bytes[at(t)] == (kept.keeps(t) ? 1 : 0));
      REQUIRE(additive[at(t)] == (kept.keeps(t) ? 0 : -std::numeric_limits<float>::infinity()));
      REQUIRE((bits[at(t / 8)] >> (t % 8) & 1) == (kept.keeps(t) ? 1 : 0));
      if (kept.keeps(t)) expected.push_back(t);
    }
    if (n % 8 != 0) REQUIRE(bits[at(n / 8)] >> (n % 8) == 0);
    expected.push_back(-7);
    REQUIRE(positions == expected);
    REQUIRE(offsets == std::vector<std::int32_t>{0, kept.length(), -7});
    REQUIRE(bytes.back() == 7);
    REQUIRE(additive.back() == 7);
    REQUIRE(bits.back() == 0xA5);
  });
}

TEST_CASE("positions of several ranges follow each other", "[retention]") {
  const std::vector<kept_range> kept{{1, 3, 4, 0, 0}, {0, 0, 0, 0, 0}, {2, 2, 3, 0, 0}};
  std::vector<std::int32_t> positions(5), offsets(4);
  write_positions(kept.data(), 3, positions.data(), offsets.data());
  CHECK(positions == std::vector<std::int32_t>{0, 3, 0, 1, 2});
  CHECK(offsets == std::vector<std::int32_t>{0, 2, 2, 5});
  std::vector<std::int64_t> sizes(4);
  write_positions(kept.data(), 3, static_cast<std::int32_t*>(nullptr), sizes.data());
  CHECK(sizes.back() == 5);
}

TEST_CASE("a union keeps what either keeps and no more than a range must", "[retention]") {
  for (position_t a = 4; a <= 10; ++a) {
    for (position_t b = 4; b <= 10; ++b) {
      const kept_range u = unite({4, a, 10, 0.1f, 0.3f}, {4, b, 10, 0.2f, 0.1f});
      CHECK(u.sinks == 4);
      CHECK(u.cut == std::min(a, b));
      CHECK(u.loss == 0.2f);
      CHECK(u.dropped_mass == 0.3f);
    }
  }
  const kept_range u = unite({2, 3, 10, 0, 0}, {5, 8, 10, 0, 0});
  CHECK(u.sinks == 5);
  CHECK(u.cut == 5);
}

TEST_CASE("protection keeps what it must and no more than a range must", "[retention]") {
  for_each_range([](const kept_range& kept) {
    const index_t n = kept.tokens;
    if (n > 9) return;
    for (index_t begin = -1; begin <= n + 1; ++begin) {
      for (index_t end = begin - 1; end <= n + 1; ++end) {
        const auto holds_all = [&](const kept_range& candidate) {
          for (index_t t = 0; t < n; ++t) {
            const bool must = kept.keeps(t) || (t >= begin && t < end);
            if (must && !candidate.keeps(t)) return false;
          }
          return true;
        };
        position_t fewest = kept.tokens;
        for (position_t sinks = 0; sinks <= n; ++sinks) {
          for (position_t cut = sinks; cut <= n; ++cut) {
            const kept_range other{sinks, cut, kept.tokens};
            if (holds_all(other)) fewest = std::min(fewest, other.length());
          }
        }
        const kept_range found = protect(kept, begin, end);
        CAPTURE(begin, end, found.sinks, found.cut);
        REQUIRE(found.tokens == n);
        REQUIRE(holds_all(found));
        REQUIRE(found.length() == fewest);
      }
    }
  });
  const kept_range kept{4, 8, 20, 0.25f, 0.5f};
  CHECK(protect(kept, 6, 7) == kept_range{4, 6, 20, 0.25f, 0.5f});
  CHECK(protect(kept, 0, 5) == kept_range{5, 8, 20, 0.25f, 0.5f});
}

TEST_CASE("moves make what is kept contiguous", "[retention]") {
  for_each_range([](const kept_range& kept) {
    for (const compaction mode : {compaction::sinks_up, compaction::suffix_down}) {
      std::vector<index_t> slots(at(kept.tokens));
      std::iota(slots.begin(), slots.end(), 0);
      const std::vector<index_t> before = slots;
      const token_move move = move_of(kept, mode);
      REQUIRE(move.tokens >= 0);
      if (mode == compaction::suffix_down && move.tokens > 0) REQUIRE(move.target <= move.source);
      if (mode == compaction::sinks_up) REQUIRE(move.tokens <= kept.sinks);
      for (index_t i = 0; i < move.tokens; ++i) {
        slots[at(move.target + i)] = before[at(move.source + i)];
      }
      index_t slot = first_slot(kept, mode);
      for (index_t t = 0; t < kept.tokens; ++t) {
        if (kept.keeps(t)) REQUIRE(slots[at(slot++)] == t);
      }
    }
  });
}

TEST_CASE("a page plan frees whole pages and never loses a kept token", "[retention]") {
  for_each_range([](const kept_range& kept) {
    for (index_t page_tokens = 1; page_tokens <= 5; ++page_tokens) {
      const index_t pages = (kept.tokens + page_tokens - 1) / page_tokens;
      for (const unsigned shared_bits : {0u, 1u, 2u, 3u, 7u, 0x15u, 0xfffffu}) {
        const std::uint8_t shared[] = {static_cast<std::uint8_t>(shared_bits & 0xff),
                                       static_cast<std::uint8_t>(shared_bits >> 8 & 0xff),
                                       static_cast<std::uint8_t>(shared_bits >> 16)};
        const auto is_shared = [&](index_t page) { return (shared_bits >> page & 1) != 0; };
        CAPTURE(page_tokens, shared_bits);
        const page_plan plan = plan_pages(kept, page_tokens, shared);
        REQUIRE(0 <= plan.first);
        REQUIRE(plan.first <= plan.last);
        REQUIRE(plan.last <= pages);

        // Play it: slots hold token numbers, the table holds page ids.
        std::vector<index_t> slots(at(pages * page_tokens), -1);
        std::iota(slots.begin(), slots.begin() + kept.tokens, 0);
        if (plan.sinks_move) {
          const token_move move = move_of(kept, compaction::sinks_up);
          const std::vector<index_t> before = slots;
          for (index_t i = 0; i < move.tokens; ++i) {
            REQUIRE_FALSE(is_shared((move.target + i) / page_tokens));
            slots[at(move.target + i)] = before[at(move.source + i)];
          }
        }
        for (index_t page = 0; page < pages; ++page) {
          bool changed = false;
          for (index_t slot = page * page_tokens; slot < (page + 1) * page_tokens; ++slot) {
            changed = changed || slots[at(slot)] != (slot < kept.tokens ? slot : -1);
          }
          REQUIRE(changed == (plan.written_first <= page && page < plan.written_last));
        }
        std::vector<int> table(at(pages)), freed(at(pages), -1);
        std::iota(table.begin(), table.end(), 100);
        const index_t count = remove_pages(plan, table.data(), pages, freed.data(), shared);
        std::set<int> private_pages;
        for (index_t page = plan.first; page < plan.last; ++page) {
          if (!is_shared(page)) private_pages.insert(static_cast<int>(100 + page));
        }
        REQUIRE(std::set<int>(freed.begin(), freed.begin() + count) == private_pages);
        REQUIRE(count == plan.freed);
        table.resize(at(pages - (plan.last - plan.first)));

        // All kept tokens are still there, in order; after a move they are contiguous.
        std::vector<index_t> held;
        for (const int page : table) {
          for (index_t i = 0; i < page_tokens; ++i) {
            held.push_back(slots[at((page - 100) * page_tokens + i)]);
          }
        }
        std::vector<index_t> expected;
        for (index_t t = 0; t < kept.tokens; ++t) {
          if (kept.keeps(t)) expected.push_back(t);
        }
        if (plan.sinks_move || kept.sinks == 0) {
          held.erase(held.begin(), held.begin() + plan.first_slot);
          held.resize(expected.size());
          REQUIRE(held == expected);
          REQUIRE(plan.first_slot < page_tokens);
        } else {
          std::size_t found = 0;
          for (const index_t token : held) {
            if (found < expected.size() && token == expected[found]) ++found;
          }
          REQUIRE(found == expected.size());
        }
        if (shared_bits == 0) {  // no plan frees more than all pages below the kept length
          const index_t most = pages - (kept.length() + page_tokens - 1) / page_tokens;
          REQUIRE(plan.last - plan.first <= most);
          REQUIRE(plan.last - plan.first >= kept.dropped() / page_tokens);
        }
      }
    }
  });
}

TEST_CASE("a page plan names the pages that sinks move to", "[retention]") {
  const page_plan plan = plan_pages({3, 15, 20}, 4);
  CHECK(plan.last == 3);
  CHECK(plan.written_first == 3);  // slots 12 to 14
  CHECK(plan.written_last == 4);
  const std::uint8_t shared = 1 << 3;
  CHECK(plan_pages({3, 15, 20}, 4, &shared).written_last == 0);  // sinks stay
}
