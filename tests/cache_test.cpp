// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cache.hpp"

#include "catch.hpp"
#include "layouts.hpp"

using namespace refreekv;

namespace {

plain_rows numbered_rows() {
  plain_rows rows(3, 5, {37, 0, 1, 64});
  float next = 0;
  for (auto& sequence : rows.values) {
    for (float& v : sequence) v = next++;
  }
  return rows;
}

std::string why(const char* reason) { return reason == nullptr ? "" : reason; }

}  // namespace

TEST_CASE("every layout gives every row through its runs", "[cache]") {
  const plain_rows rows = numbered_rows();
  for_each_layout<float>(rows, [&](const char* layout, const auto& cache) {
    INFO(layout);
    const auto source = cache.source();
    static_assert(kv_source<std::decay_t<decltype(source)>>);
    CHECK(why(source.invalid()) == "");
    CHECK(source.sequences() == 4);
    CHECK(source.kv_heads() == 3);
    CHECK(source.head_dim() == 5);
    CHECK(source.capacity() >= 64);
    for (index_t s = 0; s < 4; ++s) {
      REQUIRE(source.tokens(s) == rows.lengths[size(s)]);
      for (index_t h = 0; h < 3; ++h) {
        for (index_t begin = 0; begin < source.tokens(s); ++begin) {
          // Following runs from any token on reaches the end exactly.
          index_t t = begin;
          while (t < source.tokens(s)) {
            const auto run = source.run_at(s, h, t);
            REQUIRE(run.tokens >= 1);
            for (index_t i = 0; i < run.tokens; ++i) {
              for (index_t d = 0; d < 5; ++d) {
                REQUIRE(run.data[i * run.token_stride + d * run.dim_stride] ==
                        rows.at(s, h, t + i, d));
              }
            }
            t += run.tokens;
          }
          REQUIRE(t == source.tokens(s));
        }
      }
    }
  });
}

TEST_CASE("a dense cache without lengths is full", "[cache]") {
  std::vector<float> data(2 * 3 * 4 * 5);
  const dense cache(view(data.data(), {2, 3, 4, 5}));
  CHECK(cache.tokens(1) == 4);
  CHECK(cache.run_at(1, 2, 3).tokens == 1);
  CHECK(cache.run_at(1, 2, 3).data == &data[(1 * 3 + 2) * 4 * 5 + 3 * 5]);
}

TEST_CASE("descriptions that cannot be are refused in words", "[cache]") {
  std::vector<float> data(1000);
  const view rows(data.data(), {2, 1, 10, 4});
  const position_t good[] = {10, 0}, long_one[] = {3, 11}, negative[] = {-1, 3};
  CHECK(why(dense(rows, {good, {2}}).invalid()) == "");
  CHECK(why(dense(rows, {good, {1}}).invalid()).find("lengths") == 0);
  CHECK(why(dense(rows, {long_one, {2}}).invalid()).find("a length") == 0);
  CHECK(why(dense(rows, {negative, {2}}).invalid()).find("a length") == 0);
  CHECK(why(dense(view<float, 4>(nullptr, {2, 1, 10, 4})).invalid()).find("dense") == 0);

  const view pool(data.data(), {5, 1, 4, 4});
  const auto table = [](std::initializer_list<std::int32_t> ids, const position_t* lengths) {
    static std::vector<std::int32_t> kept;
    kept = ids;
    return page_table<std::int32_t>::padded({kept.data(), {2, 3}}, {lengths, {2}});
  };
  CHECK(why(paged(pool, table({4, 0, 1, -1, -1, -1}, good)).invalid()) == "");
  CHECK(why(paged(pool, table({5, 0, 1, 2, 2, 2}, good)).invalid()).find("a page id") == 0);
  CHECK(why(paged(pool, table({4, 0, -1, 2, 2, 2}, good)).invalid()).find("a page id") == 0);
  const position_t over[] = {13, 0};
  CHECK(why(paged(pool, table({4, 0, 1, 2, 2, 2}, over)).invalid()).find("a length") == 0);
  CHECK(why(paged(view(data.data(), {5, 1, 0, 4}), table({0, 0, 0, 0, 0, 0}, good)).invalid())
            .find("a page must") == 0);

  const std::int32_t ids[] = {3, 1, 2}, offsets[] = {0, 2, 3}, falling[] = {0, 2, 1};
  const position_t last[] = {4, 1}, none[] = {0, 1};
  const auto ragged = [&](const std::int32_t* o, const position_t* l, index_t most) {
    return paged(pool, page_table<std::int32_t>::ragged({ids, {3}}, {o, {3}}, {l, {2}}, most));
  };
  CHECK(why(ragged(offsets, last, 2).invalid()) == "");
  CHECK(ragged(offsets, last, 2).tokens(0) == 8);
  CHECK(why(ragged(falling, last, 2).invalid()).find("page offsets") == 0);
  CHECK(why(ragged(offsets, none, 2).invalid()).find("last_page_tokens") == 0);
  CHECK(why(ragged(offsets, last, 1).invalid()).find("a sequence has more pages") == 0);
  for (const index_t most : {index_t{-1}, index_t{1} << 29, index_t{1} << 60}) {
    CHECK(why(ragged(offsets, last, most).invalid()).find("a sequence may have") == 0);
  }
  const auto without_offsets = page_table<std::int32_t>::ragged({ids, {3}}, {}, {last, {1}}, 3);
  CHECK(why(paged(pool, without_offsets).invalid()).find("page table and lengths") == 0);

  const view slots(data.data(), {1, 1, 10, 4});
  const auto segments = [&](std::vector<segment> parts) {
    return why(segmented(slots, {parts.data(), {1, static_cast<index_t>(parts.size())}}).invalid());
  };
  CHECK(segments({{0, 4}, {7, 3}, {4, 3}}) == "");
  CHECK(segments({{0, 4}, {7, 4}}).find("a segment") == 0);
  CHECK(segments({{-1, 4}}).find("a segment") == 0);
  CHECK(segments({{0, 4}, {3, 2}}) == "segments overlap");
  CHECK(segments({{3, 2}, {0, 4}}) == "segments overlap");
  CHECK(segments({{0, 10}, {5, 0}}) == "");
  CHECK(segments({{0x7ffffff0, 100}, {0, 1}}).find("a segment") == 0);
  CHECK(segments({{0, 1}, {1, 1}, {2, 1}, {3, 1}}).find("segments must be") == 0);
}
