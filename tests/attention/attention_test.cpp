// SPDX-License-Identifier: Apache-2.0
#include <numbers>
#include <vector>

#include "catch.hpp"
#include "problem.hpp"
#include "refreekv/attention/chunk_statistics.hpp"
#include "refreekv/attention/query_window.hpp"

using namespace refreekv;

TEST_CASE("visible and rows_seeing are two views of one relation", "[attention]") {
  for (index_t tokens = 0; tokens <= 9; ++tokens) {
    for (index_t rows = 1; rows <= 12; ++rows) {
      for (index_t sliding = 0; sliding <= 11; ++sliding) {
        const query_window window{tokens, rows, sliding};
        CAPTURE(tokens, rows, sliding);
        REQUIRE(window.first_row() == std::max<index_t>(0, rows - tokens));
        for (index_t t = 0; t < tokens; ++t) {
          index_t seeing = 0;
          for (index_t r = window.first_row(); r < rows; ++r) {
            const index_t position = tokens - rows + r;
            const bool sees = t <= position && (sliding == 0 || position - t < sliding);
            const token_range range = window.visible(r);
            REQUIRE(sees == (range.begin <= t && t < range.end));
            seeing += sees ? 1 : 0;
          }
          REQUIRE(window.rows_seeing(t) == seeing);
        }
      }
    }
  }
}

TEST_CASE("powers of two are exact, zero below and NaN where they must be", "[attention]") {
  for (int n = -1022; n <= 1023; ++n) {
    REQUIRE(detail::power_of_two(static_cast<float>(n)) == std::ldexp(1.0, n));
  }
  CHECK(detail::power_of_two(-1023) == 0);
  CHECK(detail::power_of_two(1024) == std::numeric_limits<double>::infinity());
  CHECK(detail::power_of_two(std::numeric_limits<float>::infinity()) ==
        std::numeric_limits<double>::infinity());
  CHECK(detail::power_of_two(-1e30f) == 0);
  CHECK(detail::power_of_two(-std::numeric_limits<float>::infinity()) == 0);
  CHECK(std::isnan(detail::power_of_two(std::numeric_limits<float>::quiet_NaN())));
}

TEST_CASE("chunk statistics join to the softmax of the whole row", "[attention]") {
  random_source random(base_seed());
  const float none = -std::numeric_limits<float>::infinity();
  for (int round = 0; round < 200; ++round) {
    const float sink = random.chance(0.5) ? none : random.normal(5);
    std::vector<chunk_statistics> chunks;
    std::vector<double> logits;
    for (index_t c = random.between(1, 5); c > 0; --c) {
      chunk_statistics s{none, 0, 0};
      const index_t count = random.between(0, 6);
      if (count > 0) s.exponent = std::round(random.normal(40));
      for (index_t i = 0; i < count; ++i) {
        const double x =
            double{s.exponent} * std::numbers::ln2 - std::abs(double{random.normal(3)});
        logits.push_back(x);
        s.sum += static_cast<float>(std::exp(x - double{s.exponent} * std::numbers::ln2));
      }
      chunks.push_back(s);
    }
    const row_normaliser row =
        detail::normalise(chunks.data(), static_cast<index_t>(chunks.size()), sink);
    double sum = std::exp(double{sink});
    for (const double x : logits) sum += std::exp(x);
    INFO("REFREEKV_SEED=" << base_seed() << " round " << round);
    if (sum == 0) {
      CHECK(std::isnan(detail::weight_of(0, row)));
    } else {
      for (const float exponent : {-3.0f, 0.0f, 2.0f}) {
        CHECK(detail::weight_of(exponent, row) ==
              Approx(std::exp2(double{exponent}) / sum).epsilon(1e-5));
      }
      CHECK(detail::weight_of(none, row) == 0);
    }
  }
}

TEST_CASE("NaN in a chunk makes the row NaN", "[attention]") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float exponent : {-std::numeric_limits<float>::infinity(), 1.0f, 5.0f}) {
    const std::vector<chunk_statistics> chunks{{0, 1, 1}, {exponent, nan, 1}, {3, 2, 1}};
    CHECK(std::isnan(detail::weight_of(0, detail::normalise(chunks.data(), 3, 0))));
  }
}
