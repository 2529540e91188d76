// SPDX-License-Identifier: Apache-2.0
#include "refreekv/attention.hpp"

#include <vector>

#include "catch.hpp"
#include "problem.hpp"

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

TEST_CASE("chunk statistics join to the softmax of the whole row", "[attention]") {
  random_source random(base_seed());
  const float none = -std::numeric_limits<float>::infinity();
  for (int round = 0; round < 200; ++round) {
    const float sink = random.chance(0.5) ? none : random.normal(5);
    std::vector<chunk_statistics> chunks;
    std::vector<double> logits;
    for (index_t c = random.between(1, 5); c > 0; --c) {
      std::vector<float> x(static_cast<std::size_t>(random.between(0, 6)));
      chunk_statistics s{none, 0, 0};
      for (float& v : x) s.peak = std::max(s.peak, v = random.normal(30));
      for (const float v : x) {
        s.sum += std::exp(v - s.peak);
        logits.push_back(double{v});
      }
      chunks.push_back(s);
    }
    const row_normaliser row = normalise(chunks.data(), static_cast<index_t>(chunks.size()), sink);
    double sum = std::exp(double{sink});
    for (const double x : logits) sum += std::exp(x);
    INFO("REFREEKV_SEED=" << base_seed() << " round " << round);
    if (sum == 0) {
      CHECK(std::isnan(attention_at(0, row)));
    } else {
      for (const float x : {-3.0f, 0.0f, 2.0f}) {
        CHECK(attention_at(x, row) == Approx(std::exp(double{x}) / sum).epsilon(1e-5));
      }
      CHECK(attention_at(none, row) == 0);
    }
  }
}

TEST_CASE("NaN in a chunk makes the row NaN", "[attention]") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const chunk_statistics bad :
       {chunk_statistics{nan, nan, nan}, chunk_statistics{1, nan, 1}}) {
    const std::vector<chunk_statistics> chunks{{0, 1, 1}, bad, {3, 2, 1}};
    CHECK(std::isnan(attention_at(0, normalise(chunks.data(), 3, 0))));
  }
}
