// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/compact.hpp"

#include "catch.hpp"
#include "layouts.hpp"

using namespace refreekv;

TEST_CASE("rows move as if through a buffer in every layout", "[cpu][compact]") {
  for (index_t source = 0; source <= 40; source += 5) {
    for (index_t target = 0; target <= 40; target += 3) {
      const index_t tokens = 12;
      plain_rows rows(2, 3, {53});
      for (std::size_t i = 0; i < rows.values[0].size(); ++i) {
        rows.values[0][i] = static_cast<float>(i);
      }
      for_each_layout<float>(rows, [&](const char* layout, const auto& cache) {
        CAPTURE(layout, source, target);
        const auto cells = cache.source();
        cpu_detail::move_rows(cells, 0, 1, {source, target, tokens});
        for (index_t h = 0; h < 2; ++h) {
          for (index_t t = 0; t < 53; ++t) {
            const bool moved = h == 1 && t >= target && t < target + tokens;
            const index_t from = moved ? source + t - target : t;
            const auto run = cells.run_at(0, h, t);
            for (index_t d = 0; d < 3; ++d) {
              REQUIRE(run.data[d * run.dim_stride] == rows.at(0, h, from, d));
            }
          }
        }
        REQUIRE(cache.untouched());
      });
    }
  }
}

namespace {

/// Moves rows of `source`, whose elements are in `memory`, at once and through a buffer.
template <class Source, class Move, class F>
void check_moves(const Source& source, std::vector<float>& memory, const Move& moves, const F& f) {
  std::iota(memory.begin(), memory.end(), 0.0f);
  std::vector<float> expected = memory;
  for (const auto& [from_token, to_token] : moves) {
    const auto from = source.run_at(0, 1, from_token), to = source.run_at(0, 1, to_token);
    for (index_t d = 0; d < source.shape().head_dim; ++d) {
      expected[size(to.data - memory.data() + d * to.dim_stride)] =
          memory[size(from.data - memory.data() + d * from.dim_stride)];
    }
  }
  f();
  REQUIRE(memory == expected);
}

/// Random ranges and positions of one head, in both directions.
template <class Source>
void check_random_moves(random_source& random, const Source& source, std::vector<float>& memory) {
  std::vector<std::pair<index_t, index_t>> moves;
  const index_t tokens = source.tokens(0);
  for (int i = 0; i < 40; ++i) {
    const index_t count = random.between(0, tokens);
    const token_move move{random.between(0, tokens - count), random.between(0, tokens - count),
                          count};
    moves.clear();
    for (index_t t = 0; t < count; ++t) moves.emplace_back(move.source + t, move.target + t);
    CAPTURE(move.source, move.target, count);
    check_moves(source, memory, moves, [&] { cpu_detail::move_rows(source, 0, 1, move); });
  }
  std::vector<position_t> positions(size(tokens));
  kept_tokens count;
  const kept_positions<> kept{{positions.data(), {1, 2, tokens}, {0, 0, 1}},
                              {&count, {1, 2}, {0, 0}}};
  for (int i = 0; i < 40; ++i) {
    count = {0, static_cast<position_t>(tokens)};
    double share = 0.5;
    for (position_t t = 0; t < count.tokens; ++t) {
      if (t % 16 == 0) share = random.one_of({0.0, 0.1, 0.5, 1.0});
      if (random.chance(share)) positions[size(count.count++)] = t;
    }
    for (const auto how : {compaction::sinks_up, compaction::suffix_down}) {
      moves.clear();
      for (index_t t = 0; t < count.count; ++t) {
        moves.emplace_back(positions[size(t)], first_slot(count, how) + t);
      }
      CAPTURE(count.count, static_cast<int>(how));
      check_moves(source, memory, moves, [&] { cpu_detail::gather_rows(source, 0, 1, kept, how); });
    }
  }
}

}  // namespace

TEST_CASE("rows that lie across move in pages and segments, too", "[cpu][compact]") {
  random_source random(base_seed());
  INFO("REFREEKV_SEED=" << base_seed());
  const index_t slots = 101, dim = 3, spaced = GENERATE(1, 2);
  const position_t tokens = 90;
  for (const index_t page_tokens : {1, 3, 16, 101}) {
    CAPTURE(page_tokens, spaced);
    const index_t pages = (slots + page_tokens - 1) / page_tokens;
    const index_t row = page_tokens * spaced + 1;  // [page, kv_head, dim, slot]
    std::vector<float> memory(size(pages * 2 * dim * row));
    const view<float, 4> pool(memory.data(), {pages, 2, page_tokens, dim},
                              {2 * dim * row, dim * row, spaced, row});
    std::vector<std::int32_t> ids(size(pages));
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), random.engine());
    const auto table = page_table<std::int32_t>::padded({ids.data(), {1, pages}}, {&tokens, {1}});
    check_random_moves(random, paged<float>(pool, table), memory);
    if (pages > 1) continue;
    const std::vector<segment> segments{{0, 4}, {40, 61}, {4, 30}};
    check_random_moves(random, segmented<float>(pool, {segments.data(), {1, 3}}), memory);
  }
}
