// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/window_attention.hpp"

#include "catch.hpp"
#include "layouts.hpp"
#include "reference.hpp"

using namespace refreekv;

namespace {

struct tile_memory {
  std::vector<float> values;
  std::vector<chunk_statistics> statistics;
  std::vector<std::byte> gathered;
  tile_memory(index_t rows, index_t dim)
      : values(size(rows * cpu_detail::tile_stride), -7),
        statistics(size(rows)),
        gathered(size(cpu_detail::gathered_bytes<float>(dim))) {}
  cpu_detail::tile_scratch scratch() {
    return {values.data(), statistics.data(), gathered.data(), nullptr};
  }
  float value(index_t row, index_t token) const {
    return values[size(row * cpu_detail::tile_stride + token)];
  }
};

/// Packed queries of a KV head.
class queries_of_head {
 public:
  template <class Layer>
  queries_of_head(const Layer& layer, index_t sequence, index_t kv_head, index_t window)
      : heads_(layer.q_heads() / layer.kv_heads()),
        many_(cpu_detail::are_many(heads_ * window)),
        bytes_(size(cpu_detail::packed_bytes<cpu_detail::product_of<Layer>>(heads_ * window,
                                                                            layer.head_dim()))) {
    for (index_t h = kv_head * heads_; h < (kv_head + 1) * heads_; ++h) {
      cpu_detail::pack_queries(layer, sequence, h, window, packed());
    }
  }
  cpu_detail::packed_queries packed() { return {bytes_.data(), many_}; }

 private:
  index_t heads_;
  bool many_;
  std::vector<std::byte> bytes_;
};

/// attend, or summarise, on one block.
template <class Layer>
void attend(const Layer& layer, const query_window& window, const cpu_detail::chunk_place& block,
            tile_memory& memory) {
  const cpu_detail::chunk_addresses keys(layer.keys, block, block);
  queries_of_head queries(layer, block.sequence, block.kv_head, window.rows);
  cpu_detail::attend(cpu_detail::queries_of(layer, block.kv_head, queries.packed()), window,
                     block.tokens, keys, memory.scratch());
}
template <class Layer>
bool summarise(const Layer& layer, const query_window& window, const cpu_detail::chunk_place& block,
               tile_memory& memory) {
  const cpu_detail::chunk_addresses keys(layer.keys, block, block);
  queries_of_head queries(layer, block.sequence, block.kv_head, window.rows);
  return cpu_detail::summarise(cpu_detail::queries_of(layer, block.kv_head, queries.packed()),
                               window, block.tokens, keys, memory.scratch());
}

}  // namespace

TEST_CASE("a tile of queries and keys is attention up to each row's unit", "[cpu][attention]") {
  random_source random(base_seed());
  problem p(2, 3, 16, 5, {30, 3});
  fill(p, random);
  p.sliding_window = 9;
  const dense_cache<float> keys(p.keys);
  const auto layer = observe(p.query_view(), keys.source(), p.info());
  for (index_t s = 0; s < 2; ++s) {
    const auto exact = reference::attend(p, s);
    const query_window window{p.lengths[size(s)], 5, 9};
    tile_memory memory(15, 16);
    const token_range range{1, p.lengths[size(s)]};
    attend(layer, window, {s, 1, range}, memory);
    for (index_t i = 0; i < 15; ++i) {
      const index_t head = 3 + i / 5, row = i % 5;
      const chunk_statistics& statistics = memory.statistics[size(i)];
      double best = 0, total = 0;
      for (index_t t = range.begin; t < range.end; ++t) {
        best = std::max(best, exact.at(head, row, t));
        total += exact.at(head, row, t);
      }
      CAPTURE(s, head, row);
      REQUIRE((statistics.exponent == -std::numeric_limits<float>::infinity()) == (best == 0));
      if (best == 0) continue;
      CHECK(std::round(statistics.exponent) == statistics.exponent);
      // One factor turns the values of a row into its attention.
      const double factor = total / double{statistics.sum};
      double squares = 0;
      for (index_t t = range.begin; t < range.end; ++t) {
        const double value = memory.value(i, t - range.begin);
        CHECK(value * factor == Approx(exact.at(head, row, t)).epsilon(1e-5).margin(1e-15));
        CHECK(value <= std::sqrt(2.0) * 1.00001);
        squares += value * value;
      }
      CHECK(double{statistics.sum_squares} == Approx(squares).epsilon(1e-6));
    }
  }
}

TEST_CASE("statistics without values are those of the values", "[cpu][attention]") {
  random_source random(base_seed());
  INFO("REFREEKV_SEED=" << base_seed());
  int fits = 0;
  for (int round = 0; round < 300; ++round) {
    const index_t group = random.between(1, 7), rows = random.between(1, 3);
    const auto tokens = static_cast<position_t>(random.between(8, 400));
    problem p(2, group, 32, rows, {tokens});
    fill(p, random);
    p.scale = random.chance(0.3) ? 20.0f : 0.2f;  // steep ones do not fit
    const dense_cache<float> keys(p.keys);
    const auto layer = observe(p.query_view(), keys.source(), p.info());
    const query_window window{tokens, rows, 0};
    const index_t count = random.between(1, std::min<index_t>(tokens - rows + 1, 256) / 4) * 4;
    const index_t first = random.between(0, std::max<index_t>(0, tokens - rows + 1 - count));
    const cpu_detail::chunk_place block{0, 1, {first, first + count}};
    tile_memory summary(group * rows, 32), whole(group * rows, 32);
    if (!summarise(layer, window, block, summary)) continue;
    ++fits;
    attend(layer, window, block, whole);
    for (index_t i = 0; i < group * rows; ++i) {
      const chunk_statistics &got = summary.statistics[size(i)],
                             &expected = whole.statistics[size(i)];
      const double factor = std::exp2(double{got.exponent} - double{expected.exponent});
      CHECK(double{got.sum} * factor == Approx(double{expected.sum}).epsilon(2e-6));
      CHECK(double{got.sum_squares} * factor * factor ==
            Approx(double{expected.sum_squares}).epsilon(2e-6));
    }
  }
  CHECK(fits > 100);
}

TEST_CASE("what does not fit the first unit is told", "[cpu][attention]") {
  const float inf = std::numeric_limits<float>::infinity();
  for (const auto& [last, fits] :
       {std::pair{30.0f, true}, {36.0f, false}, {1e30f, false}, {inf, false}}) {
    problem p(1, 1, 1, 1, {8});
    p.scale = 1;
    p.query(0, 0, 0, 0) = 1;
    p.keys.at(0, 0, 7, 0) = last;
    const dense_cache<float> keys(p.keys);
    tile_memory memory(1, 1);
    CAPTURE(last);
    CHECK(summarise(observe(p.query_view(), keys.source(), p.info()), {8, 1, 0}, {0, 0, {0, 8}},
                    memory) == fits);
    if (fits) CHECK(double{memory.statistics[0].sum} == Approx(7 + std::exp(double{last})));
  }
}

TEST_CASE("NaN and infinities come to the same on both ways", "[cpu][attention]") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  for (index_t poisoned = 0; poisoned < 8; ++poisoned) {
    for (const float poison : {nan, inf, -inf}) {
      problem p(1, 3, 1, 1, {8});
      p.scale = 1;
      for (index_t h = 0; h < 3; ++h) p.query(0, 0, h, 0) = 1;
      p.keys.at(0, 0, poisoned, 0) = poison;
      const dense_cache<float> keys(p.keys);
      const auto layer = observe(p.query_view(), keys.source(), p.info());
      tile_memory summary(3, 1), whole(3, 1);
      attend(layer, {8, 1, 0}, {0, 0, {0, 8}}, whole);
      const bool fits = summarise(layer, {8, 1, 0}, {0, 0, {0, 8}}, summary);
      CAPTURE(poisoned, poison, fits);
      if (poison == inf) CHECK(!fits);
      for (std::size_t i = 0; i < 3; ++i) {
        CHECK(std::isnan(whole.statistics[i].sum) == (poison != -inf));
        if (!fits) continue;
        CHECK(std::isnan(summary.statistics[i].sum) == (poison != -inf));
        if (poison == -inf) CHECK(summary.statistics[i].sum == Approx(7));
      }
    }
  }
}

TEST_CASE("logits of any size are decided on within a block", "[cpu][attention]") {
  // Far beyond the digits of a float a block's peak still has all the weight.
  for (const float base : {0.0f, 1e4f, -3e5f, 1e7f, -1e30f}) {
    problem p(1, 1, 1, 1, {3});
    p.scale = 1;
    p.query(0, 0, 0, 0) = 1;
    for (index_t t = 0; t < 3; ++t) {
      p.keys.at(0, 0, t, 0) = t == 1 ? base + std::abs(base) * 0.5f + 100 : base;
    }
    const dense_cache<float> keys(p.keys);
    tile_memory memory(1, 1);
    attend(observe(p.query_view(), keys.source(), p.info()), {3, 1, 0}, {0, 0, {0, 3}}, memory);
    CAPTURE(base);
    CHECK(memory.value(0, 1) > 0.7f);
    CHECK(memory.value(0, 1) < 1.5f);
    CHECK(memory.value(0, 0) < 1e-17f);
    CHECK(memory.value(0, 2) < 1e-17f);
    CHECK(memory.statistics[0].sum == memory.value(0, 1));
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
  attend(observe(p.query_view(), keys.source(), p.info()), {3, 1, 0}, {0, 0, {0, 3}}, memory);
  CHECK(memory.values[0] == 1);
  for (const std::size_t t : {1u, 2u}) {
    CHECK(memory.values[t] < 1e-17f);
    CHECK((memory.values[t] == 0 ||
           std::fpclassify(memory.values[t] * memory.values[t]) == FP_NORMAL));
  }
}

TEST_CASE("exact values are resolved down to the smallest, and hidden ones are 0",
          "[cpu][attention]") {
  random_source random(base_seed());
  INFO("REFREEKV_SEED=" << base_seed());
  for (const index_t group : {1, 3, 7}) {
    for (const index_t rows : {1, 3, 5}) {
      problem p(1, group, 8, rows, {200});
      fill(p, random);
      p.scale = random.one_of({0.3f, 20.0f});  // with the steeper ones most values are tiny
      p.sliding_window = 100;
      const dense_cache<float> keys(p.keys);
      const auto layer = observe(p.query_view(), keys.source(), p.info());
      const query_window window{200, rows, 100};
      const token_range range{60, 200};
      tile_memory memory(group * rows, 8);
      cpu_detail::attend_chunk(layer, window, queries_of_head(layer, 0, 0, rows).packed(),
                               {0, 0, range}, {0, 0, range}, cpu_detail::output::exact_values,
                               memory.scratch());
      for (index_t i = 0; i < group * rows; ++i) {
        double sum = 0;
        for (index_t t = range.begin; t < range.end; ++t) {
          const double value = memory.value(i, t - range.begin);
          sum += value;
          CAPTURE(group, rows, i, t);
          if (!p.sees(0, i % rows, t)) {
            REQUIRE(value == 0);
            continue;
          }
          double logit = 0;
          for (index_t d = 0; d < 8; ++d) {
            logit += double{p.query(0, i % rows, i / rows, d)} * double{p.key(0, 0, t, d)};
          }
          logit *= double{p.scale};
          const double exact =
              std::exp(logit - double{memory.statistics[size(i)].exponent} * std::log(2.0));
          const double error = 1e-5 + 4e-7 * std::abs(logit);  // the logit's own rounding
          REQUIRE(std::abs(value - exact) <= error * exact + std::exp2(-119));
        }
        REQUIRE(double{memory.statistics[size(i)].sum} == Approx(sum).epsilon(1e-6));
      }
    }
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
    attend(observe(p.query_view(), keys.source(), p.info()), {3, 1, 0}, {0, 0, {0, 3}}, memory);
    return memory.statistics[0].sum;
  };
  CHECK(sum() < 1e-17f);
  CHECK(memory.statistics[0].exponent == -inf);
  p.keys.at(0, 0, 1, 0) = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(sum()));
}

TEST_CASE("ready rows become values in units of a power of two", "[cpu][attention]") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> rows{0.5f, 0.25f, nan, 0.125f, 0.75f, 0.25f};
  const auto layer = observe_rows(view(rows.data(), {1, 2, 1, 3}), 1);
  tile_memory memory(2, 1);
  cpu_detail::attend(layer, {3, 2, 0}, {0, 0, {1, 3}}, memory.scratch());
  CHECK(memory.statistics[0].exponent == -2);
  CHECK(memory.value(0, 0) == 1);
  CHECK(memory.value(0, 1) == 0);  // the row of token 1 cannot see token 2, whatever stands there
  CHECK(memory.statistics[1].exponent == -1);
  CHECK(memory.value(1, 0) == 1.5f);
  CHECK(memory.value(1, 1) == 0.5f);
  CHECK(memory.statistics[1].sum == 2);
  CHECK(memory.statistics[1].sum_squares == 2.5f);
}

TEST_CASE("ready rows may be tiny, empty or no numbers", "[cpu][attention]") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  tile_memory memory(1, 1);
  const auto statistics = [&](std::vector<float> row) {
    const auto layer = observe_rows(view(row.data(), {1, 1, 1, 2}), 1);
    cpu_detail::attend(layer, {2, 1, 0}, {0, 0, {0, 2}}, memory.scratch());
    return memory.statistics[0];
  };
  CHECK(statistics({0, 0}).exponent == -inf);
  CHECK(statistics({0, 0}).sum == 0);
  const chunk_statistics tiny = statistics({1e-44f, 3e-45f});
  CHECK(tiny.exponent == static_cast<float>(std::ilogb(1e-44f)));
  CHECK(tiny.sum == std::ldexp(1e-44f + 3e-45f, -std::ilogb(1e-44f)));
  CHECK(std::isnan(statistics({0.5f, nan}).sum));
  CHECK(std::isnan(statistics({nan, nan}).sum));
  CHECK(!std::isfinite(statistics({0.5f, inf}).sum));
}
