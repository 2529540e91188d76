// SPDX-License-Identifier: Apache-2.0
#include "catch.hpp"
#include "layouts.hpp"
#include "refreekv/cache/dense.hpp"
#include "refreekv/cache/segmented.hpp"
#include "refreekv/cache/source.hpp"

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
    CHECK(source.shape().sequences == 4);
    CHECK(source.shape().kv_heads == 3);
    CHECK(source.shape().head_dim == 5);
    CHECK(source.shape().capacity >= 64);
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

TEST_CASE("dense and segmented caches that cannot be are refused in words", "[cache]") {
  std::vector<float> data(1000);
  const view rows(data.data(), {2, 1, 10, 4});
  const position_t good[] = {10, 0}, long_one[] = {3, 11}, negative[] = {-1, 3};
  CHECK(why(dense(rows, {good, {2}}).invalid()) == "");
  CHECK(why(dense(rows, {good, {1}}).invalid()).find("lengths") == 0);
  CHECK(why(dense(rows, {long_one, {2}}).invalid()).find("a length") == 0);
  CHECK(why(dense(rows, {negative, {2}}).invalid()).find("a length") == 0);
  CHECK(why(dense(view<float, 4>(nullptr, {2, 1, 10, 4})).invalid()).find("dense") == 0);

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
