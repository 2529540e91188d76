// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/attention.hpp"

#include "catch.hpp"
#include "layouts.hpp"
#include "reference.hpp"

using namespace refreekv;

namespace {

struct tile_memory {
  std::vector<float> values, peaks, gathered, energies;
  tile_memory(index_t rows, index_t dim)
      : values(size(rows * chunk_tokens), -7),
        peaks(size(rows)),
        gathered(size(cpu_detail::gather_tokens * dim)),
        energies(size(chunk_tokens)) {}
  cpu_detail::tile_scratch scratch() {
    return {values.data(), peaks.data(), gathered.data(), energies.data()};
  }
};

}  // namespace

TEST_CASE("a tile of queries and keys is attention up to each row's factor", "[cpu][attention]") {
  random_source random(base_seed());
  problem p(2, 3, 16, 5, {30, 3});
  fill(p, random);
  p.sliding_window = 9;
  const dense_cache<float> keys(p.keys);
  const auto seen = observe(p.query_view(), keys.source(), p.info());
  std::vector<float> packed(p.queries.size());
  for (index_t s = 0; s < 2; ++s) {
    for (index_t h = 0; h < 6; ++h) {
      cpu_detail::pack_queries(seen, s, h, 5, packed.data() + (s * 6 + h) * 5 * 16);
    }
  }
  for (index_t s = 0; s < 2; ++s) {
    const auto exact = reference::attend(p, s);
    const query_window window{p.lengths[size(s)], 5, 9};
    tile_memory memory(15, 16);
    const token_range range{1, p.lengths[size(s)]};
    cpu_detail::attend(seen, window, s, 1, range, packed.data(), memory.scratch());
    for (index_t i = 0; i < 15; ++i) {
      const index_t head = 3 + i / 5, row = i % 5;
      // The factor is the attention of the row's best token in the range.
      double best = 0;
      for (index_t t = range.begin; t < range.end; ++t)
        best = std::max(best, exact.at(head, row, t));
      CHECK((memory.peaks[size(i)] == -std::numeric_limits<float>::infinity()) == (best == 0));
      for (index_t t = range.begin; t < range.end; ++t) {
        const float value = memory.values[size(i * chunk_tokens + t - range.begin)];
        CAPTURE(s, head, row, t);
        CHECK(double{value} * best == Approx(exact.at(head, row, t)).epsilon(1e-5).margin(1e-15));
        CHECK(value <= 1);
      }
    }
  }
}

TEST_CASE("a value far below its row's peak is not denormal", "[cpu][attention]") {
  problem p(1, 1, 1, 1, {3});
  p.scale = 1;
  p.query(0, 0, 0, 0) = 1;
  for (const auto& [t, x] : {std::pair{0, 0.0f}, {1, -60.0f}, {2, -500.0f}}) {
    p.keys.at(0, 0, t, 0) = x;
  }
  const dense_cache<float> keys(p.keys);
  tile_memory memory(1, 1);
  cpu_detail::attend(observe(p.query_view(), keys.source(), p.info()), {3, 1, 0}, 0, 0, {0, 3},
                     p.queries.data(), memory.scratch());
  CHECK(memory.values[0] == 1);
  for (const std::size_t t : {1u, 2u}) {
    CHECK(memory.values[t] < 1e-17f);
    CHECK((memory.values[t] == 0 ||
           std::fpclassify(memory.values[t] * memory.values[t]) == FP_NORMAL));
  }
}

TEST_CASE("NaN shows even where nothing else is visible", "[cpu][attention]") {
  const float inf = std::numeric_limits<float>::infinity();
  problem p(1, 1, 1, 1, {3});
  p.query(0, 0, 0, 0) = 1;
  for (index_t t = 0; t < 3; ++t) p.keys.at(0, 0, t, 0) = -inf;
  tile_memory memory(1, 1);
  const auto sum = [&] {
    const dense_cache<float> keys(p.keys);
    cpu_detail::attend(observe(p.query_view(), keys.source(), p.info()), {3, 1, 0}, 0, 0, {0, 3},
                       p.queries.data(), memory.scratch());
    return memory.values[0] + memory.values[1] + memory.values[2];
  };
  CHECK(sum() == 0);
  CHECK(memory.peaks[0] == -inf);
  p.keys.at(0, 0, 1, 0) = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(sum()));
}

TEST_CASE("ready rows become values relative to their peak", "[cpu][attention]") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> rows{0.5f, 0.25f, nan, 0.125f, 0.5f, 0.25f};
  const auto seen = observe_rows(view(rows.data(), {1, 2, 1, 3}), 1);
  tile_memory memory(2, 1);
  cpu_detail::attend(seen, {3, 2, 0}, 0, 0, {1, 3}, nullptr, memory.scratch());
  CHECK(memory.peaks[0] == 0.25f);
  CHECK(memory.values[0] == 1);
  CHECK(memory.values[1] == 0);  // the row of token 1 cannot see token 2, whatever stands there
  CHECK(memory.peaks[1] == 0.5f);
  CHECK(memory.values[chunk_tokens] == 1);
  CHECK(memory.values[chunk_tokens + 1] == 0.5f);
}
