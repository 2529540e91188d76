// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/token_scores.hpp"

#include "catch.hpp"
#include "layouts.hpp"
#include "reference.hpp"

using namespace refreekv;

namespace {

/// Scores, and how the work was divided.
struct scored {
  std::vector<float> scores;
  index_t slots, rows;
};

/// Sums attention to keys in a buffer of that capacity, with that many threads.
scored scores_of(const problem& p, index_t capacity, int threads, score_rows summed) {
  const index_t heads = p.keys.kv_heads, dim = p.head_dim;
  std::vector<float> buffer(size(p.sequences() * heads * capacity * dim));
  const view<float, 4> keys(buffer.data(), {p.sequences(), heads, capacity, dim});
  for (index_t s = 0; s < p.sequences(); ++s) {
    for (index_t h = 0; h < heads; ++h) {
      for (index_t t = 0; t < p.lengths[size(s)]; ++t) {
        for (index_t d = 0; d < dim; ++d) keys(s, h, t, d) = p.key(s, h, t, d);
      }
    }
  }
  const auto layer =
      observe(p.query_view(), dense<float>(keys, {p.lengths.data(), {p.sequences()}}), p.info());
  const auto carve = [&](arena& from) {
    return cpu_detail::attention_scratch::carve(from, threads, summed.rows, layer);
  };
  arena count;
  (void)carve(count);
  std::vector<std::byte> memory(count.bytes());
  arena from(memory.data());
  const auto scratch = carve(from);
  std::vector<float> scores(size(p.sequences() * heads * p.keys.longest()));
  std::vector<kept_tokens> counts(size(p.sequences() * heads));
  const thread_pool pool(threads);
  cpu_detail::attention_sums(pool, summed, layer,
                             scores_view<>(scores.data(), {p.sequences(), heads, p.keys.longest()}),
                             {counts.data(), {p.sequences(), heads}}, scratch);
  return {std::move(scores), scratch.slot_count, scratch.rows};
}

}  // namespace

TEST_CASE("scores are the same bits with any capacity and number of threads", "[cpu][scores]") {
  random_source random(base_seed());
  INFO("REFREEKV_SEED=" << base_seed());
  problem p(3, 4, 8, 37, {700, 20, 0, 301});
  fill(p, random);
  const score_rows summed{37};
  const scored whole = scores_of(p, 700, 1, summed);
  CHECK(whole.slots > 1);
  CHECK(whole.rows == 16);
  for (index_t s = 0; s < 4; ++s) {
    const auto exact = reference::attend(p, s);
    for (index_t h = 0; h < 3; ++h) {
      for (index_t t = 0; t < p.lengths[size(s)]; ++t) {
        double sum = 0;
        for (index_t i = 0; i < 4 * 37; ++i) sum += exact.at(4 * h + i / 37, i % 37, t);
        CAPTURE(s, h, t);
        REQUIRE(double{whole.scores[size((s * 3 + h) * 700 + t)]} == Approx(sum / 4).epsilon(2e-5));
      }
    }
  }
  CHECK(scores_of(p, 700, 3, summed).scores == whole.scores);
  // Long sequences: fewer rows and KV heads at a time.
  const scored longer = scores_of(p, 70'000, 1, summed), longest = scores_of(p, 150'000, 2, summed);
  CHECK(longer.rows == 7);
  CHECK(longer.slots == 1);
  CHECK(longer.scores == whole.scores);
  CHECK(longest.rows == 4);
  CHECK(longest.scores == whole.scores);
}

TEST_CASE("a sequence with few rows has the same scores beside one with many", "[cpu][scores]") {
  random_source random(base_seed());
  INFO("REFREEKV_SEED=" << base_seed());
  problem both(2, 4, 24, 32, {300, 300}), alone(2, 4, 24, 1, {300});
  fill(both, random);
  both.row_counts = {1, 32};
  alone.scale = both.scale;
  alone.keys.values[0] = both.keys.values[0];
  for (index_t h = 0; h < 8; ++h) {
    for (index_t d = 0; d < 24; ++d) alone.query(0, 0, h, d) = both.query(0, 31, h, d);
  }
  const std::vector<float> of_both = scores_of(both, 300, 2, {32}).scores;
  const std::vector<float> expected = scores_of(alone, 300, 2, {1}).scores;
  CHECK(std::vector<float>(of_both.begin(), of_both.begin() + 600) == expected);
}

TEST_CASE("scratch for many rows serves a single row", "[cpu][scores]") {
  random_source random(base_seed());
  INFO("REFREEKV_SEED=" << base_seed());
  for (const index_t window : {2, 8}) {
    // A head_dim of 1 takes more memory for few rows, in whole registers, than for many.
    problem p(1, 8, 1, window, {100});
    fill(p, random);
    std::vector<bf16_bits> keys;
    for (const float x : p.keys.values[0]) keys.push_back(to_element<bf16_bits>(x));
    const auto layer =
        observe(p.query_view(), dense(view<bf16_bits, 4>(keys.data(), {1, 1, 100, 1})), p.info());
    const auto sums_of = [&](index_t rows) {
      const auto carve = [&](arena& from) {
        return cpu_detail::attention_scratch::carve(from, 3, rows, layer);
      };
      arena count;
      (void)carve(count);
      std::vector<std::byte> memory(count.bytes() + 64, std::byte{77});
      arena from(memory.data());
      const auto scratch = carve(from);
      std::vector<float> scores(100);
      kept_tokens counts;
      cpu_detail::attention_sums(thread_pool(3), score_rows{1}, layer,
                                 scores_view<>(scores.data(), {1, 1, 100}), {&counts, {1, 1}},
                                 scratch);
      CHECK(std::all_of(memory.end() - 64, memory.end(),
                        [](std::byte b) { return b == std::byte{77}; }));
      return scores;
    };
    CAPTURE(window);
    CHECK(sums_of(window) == sums_of(1));
  }
}
