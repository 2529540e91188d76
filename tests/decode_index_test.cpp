// SPDX-License-Identifier: Apache-2.0
#include "refreekv/decode_index.hpp"

#include "estimates.hpp"
#include "ranked_selection.hpp"

using namespace refreekv;

namespace {

plain_rows random_rows(unsigned seed, index_t dims = 7) {
  random_source random(seed);
  plain_rows rows(2, dims, {30, 0, 5, 1});
  for (auto& sequence : rows.values) {
    for (float& x : sequence) x = random.normal();
  }
  return rows;
}

}  // namespace

TEST_CASE("codes are within half a step of the keys, in every layout", "[decode_index]") {
  const plain_rows rows = random_rows(base_seed());
  for_each_layout<float>(rows, [&](const char* layout, const auto& cache) {
    INFO(layout);
    estimates memory(cache.source(), rows.lengths, 4);
    const int4_keys<> to = memory.keys();
    REQUIRE(quantise(divided<2>(), cache.source(), to) == status::ok);
    for (index_t s = 0; s < rows.sequences(); ++s) {
      for (index_t h = 0; h < rows.kv_heads; ++h) {
        for (index_t t = 0; t < rows.lengths[size(s)]; ++t) {
          const float step = to.ranges(s, h, t, 1);
          const std::vector<double> estimate = memory.key(s, h, t);
          int smallest = 15, largest = 0;
          for (index_t d = 0; d < rows.head_dim; ++d) {
            const int code = memory.code(s, h, t, d);
            smallest = std::min(smallest, code);
            largest = std::max(largest, code);
            const double error = double{rows.at(s, h, t, d)} - estimate[size(d)];
            CHECK(std::abs(error) <= 0.5001 * double{step});
          }
          CHECK(smallest == 0);
          CHECK(largest == 15);
        }
      }
    }
  });
}

TEST_CASE("bounds are those of each page's keys", "[decode_index]") {
  const plain_rows rows = random_rows(base_seed() + 1);
  const dense_cache<float> cache(rows);
  estimates memory(cache.source(), rows.lengths, 4);
  const page_bounds<> to = memory.page_bounds();
  REQUIRE(bound_pages(divided<1>(), cache.source(), to) == status::ok);
  for (index_t s = 0; s < rows.sequences(); ++s) {
    for (index_t h = 0; h < rows.kv_heads; ++h) {
      for (index_t page = 0; page * 4 < rows.lengths[size(s)]; ++page) {
        for (index_t d = 0; d < rows.head_dim; ++d) {
          float low = rows.at(s, h, page * 4, d), high = low;
          for (index_t t = page * 4; t < std::min<index_t>(page * 4 + 4, rows.lengths[size(s)]);
               ++t) {
            low = std::min(low, rows.at(s, h, t, d));
            high = std::max(high, rows.at(s, h, t, d));
          }
          CHECK(to.bounds(s, h, page, 0, d) == low);
          CHECK(to.bounds(s, h, page, 1, d) == high);
        }
      }
    }
  }
}

TEST_CASE("tokens that come later leave the same index as all at once", "[decode_index]") {
  const plain_rows rows = random_rows(base_seed() + 2, 8);
  const dense_cache<float> cache(rows);
  estimates whole(cache.source(), rows.lengths, 4), grown(cache.source(), rows.lengths, 4);
  REQUIRE(quantise(divided<1>(), cache.source(), whole.keys()) == status::ok);
  REQUIRE(bound_pages(divided<1>(), cache.source(), whole.page_bounds()) == status::ok);
  std::vector<position_t> from(4, 0);
  for (position_t length = 1; length <= 30; length += 3) {
    std::vector<position_t> lengths;
    for (const position_t n : rows.lengths) lengths.push_back(std::min(n, length));
    plain_rows shorter(2, 8, lengths);
    for (index_t s = 0; s < 4; ++s) {
      for (index_t h = 0; h < 2; ++h) {
        for (index_t t = 0; t < lengths[size(s)]; ++t) {
          for (index_t d = 0; d < 8; ++d) shorter.at(s, h, t, d) = rows.at(s, h, t, d);
        }
      }
    }
    const dense_cache<float> so_far(shorter);
    const lengths_view<> first(from.data(), {4});
    REQUIRE(quantise(divided<1>(), so_far.source(), grown.keys(), first) == status::ok);
    REQUIRE(bound_pages(divided<1>(), so_far.source(), grown.page_bounds(), first) == status::ok);
    from = lengths;
  }
  // The last step went to 28 of 30 tokens.
  REQUIRE(quantise(divided<1>(), cache.source(), grown.keys(), {from.data(), {4}}) == status::ok);
  REQUIRE(bound_pages(divided<1>(), cache.source(), grown.page_bounds(), {from.data(), {4}}) ==
          status::ok);
  CHECK(grown.same_as(whole));
}

TEST_CASE("NaN in a key stays in its codes and bounds", "[decode_index]") {
  for (index_t d = 0; d < 4; ++d) {
    plain_rows rows(1, 4, {8});
    for (index_t t = 0; t < 8; ++t) {
      for (index_t i = 0; i < 4; ++i) rows.at(0, 0, t, i) = static_cast<float>(i + t);
    }
    rows.at(0, 0, 1, d) = std::nanf("");
    const dense_cache<float> cache(rows);
    estimates memory(cache.source(), rows.lengths, 4);
    REQUIRE(quantise(divided<1>(), cache.source(), memory.keys()) == status::ok);
    REQUIRE(bound_pages(divided<1>(), cache.source(), memory.page_bounds()) == status::ok);
    CHECK(std::isnan(memory.key(0, 0, 1)[size(d)]));
    CHECK_FALSE(std::isnan(memory.key(0, 0, 2)[size(d)]));
    CHECK(std::isnan(memory.page_bounds().bounds(0, 0, 0, 0, d)));
    CHECK(std::isnan(memory.page_bounds().bounds(0, 0, 0, 1, d)));
    CHECK_FALSE(std::isnan(memory.page_bounds().bounds(0, 0, 1, 0, d)));
  }
}

TEST_CASE("twilight keeps the same tokens of keys that 4 bits can hold", "[decode_index]") {
  random_source random(base_seed() + 3);
  problem p(2, 3, 16, 1, {200, 40});
  for (float& q : p.queries) q = random.normal();
  for (auto& sequence : p.keys.values) {
    for (std::size_t i = 0; i < sequence.size(); ++i) {
      // Every key has a -7.5 and a 7.5, so steps are 1.
      sequence[i] = i % 16 < 2 ? (i % 2 == 0 ? -7.5f : 7.5f)
                               : static_cast<float>(random.between(0, 15)) - 7.5f;
    }
  }
  const dense_cache<float> cache(p.keys);
  estimates memory(cache.source(), p.lengths, 4);
  REQUIRE(quantise(divided<1>(), cache.source(), memory.keys()) == status::ok);
  const policy::twilight rule{.p = 0.9};
  const auto exact = observe(p.query_view(), cache.source(), p.info());
  const auto estimate = observe(p.query_view(), memory.keys(), p.info());
  const ranked_selection expected = run_ranked(rule, divided<1>(), exact);
  REQUIRE(expected.status == status::ok);
  CHECK(expected.counts[0].dropped() > 0);
  CHECK(run_ranked(rule, divided<1>(), estimate) == expected);
}

TEST_CASE("pages that a sliding window hides take no place", "[decode_index]") {
  problem p(1, 1, 4, 1, {64});
  p.query(0, 0, 0, 0) = 1;
  // The pages that the query does not see have the largest keys.
  for (index_t t = 0; t < 64; ++t) p.keys.at(0, 0, t, 0) = t < 48 ? 9.0f : 0.0f;
  p.sliding_window = 16;
  const dense_cache<float> cache(p.keys);
  estimates memory(cache.source(), p.lengths, 4);
  REQUIRE(bound_pages(divided<1>(), cache.source(), memory.page_bounds()) == status::ok);
  const auto seen =
      with_pages(observe(p.query_view(), cache.source(), p.info()), memory.page_bounds());
  const ranked_selection s =
      run_ranked(policy::twilight{.p = 1, .selected = 8}, divided<1>(), seen);
  REQUIRE(s.status == status::ok);
  CHECK(s.at(0) == std::vector<position_t>{48, 49, 50, 51, 52, 53, 54, 55});
}

TEST_CASE("an index of another shape is refused", "[decode_index]") {
  const plain_rows rows = random_rows(base_seed() + 4), other = random_rows(base_seed() + 4, 8);
  const dense_cache<float> cache(rows), wider(other);
  estimates memory(cache.source(), rows.lengths, 4);
  CHECK(quantise(divided<1>(), wider.source(), memory.keys()) == status::invalid_argument);
  CHECK(bound_pages(divided<1>(), wider.source(), memory.page_bounds()) ==
        status::invalid_argument);
  int4_keys<> keys = memory.keys();
  keys.dims = 9;
  CHECK(quantise(divided<1>(), cache.source(), keys) == status::invalid_argument);
  page_bounds<> bounds = memory.page_bounds();
  bounds.page_tokens = 0;
  CHECK(bound_pages(divided<1>(), cache.source(), bounds) == status::invalid_argument);
  bounds.page_tokens = 4;
  bounds.bounds = {bounds.bounds.data(), {4, 2, 7, 2, 7}};  // of 8 pages
  CHECK(bound_pages(divided<1>(), cache.source(), bounds) == status::invalid_argument);
  const position_t before[] = {-1, 0, 0, 0};
  CHECK(quantise(divided<1>(), cache.source(), memory.keys(), {before, {4}}) ==
        status::invalid_argument);
}
