// SPDX-License-Identifier: Apache-2.0
#include "refreekv/backend/norm_scan.hpp"

#include <vector>

#include "catch.hpp"
#include "refreekv/core/chunks.hpp"

using namespace refreekv;

TEST_CASE("chunks cover the sequence, sinks first and alone", "[norm_scan]") {
  for (const index_t sinks : {0, 1, 4, 256, 257, 300, 1000}) {
    for (const index_t tokens : {0, 1, 4, 5, 255, 256, 257, 260, 261, 516, 517, 5000}) {
      CAPTURE(sinks, tokens);
      const chunking chunks{tokens, sinks};
      REQUIRE(chunks.count() >= 1);
      index_t end = 0;
      for (index_t c = 0; c < chunks.count(); ++c) {
        CHECK(chunks[c].begin == end);
        CHECK((chunks[c].end > chunks[c].begin || c == 0));
        if (chunks[c].end > chunks[c].begin) {
          CHECK(chunks.of(chunks[c].begin) == c);
          CHECK(chunks.of(chunks[c].end - 1) == c);
        }
        CHECK(chunks[c].end - chunks[c].begin <= chunk_tokens);
        end = chunks[c].end;
        if (c < chunking::of_sinks(sinks)) {
          CHECK(end <= sinks);
        } else {
          CHECK(chunks[c].begin >= sinks);
        }
      }
      CHECK(end == tokens);
    }
  }
}

TEST_CASE("the last allowed index is the last whose loss is at most the threshold", "[norm_scan]") {
  const std::vector<double> curve{1.0, 0.999, 0.99, 0.95, 0.95, 0.1, 0.0};
  const auto last = [&](double threshold) {
    return norm_scan{threshold, 4, 1, {}, {}, {}}.last_allowed(
        curve.data(), static_cast<index_t>(curve.size()), 1.0);
  };
  CHECK(last(0) == 0);
  CHECK(last(0.0011) == 1);
  CHECK(last(0.0101) == 2);
  CHECK(last(0.06) == 4);
  CHECK(last(0.9) == 5);
  CHECK(last(1) == 6);
}

TEST_CASE("stop keeps all where the norm says nothing", "[norm_scan]") {
  const norm_scan scan{0.01, 4, 1, {}, {}, {}};
  const std::vector<double> inside(chunk_tokens, 1e9);
  const std::vector<float> masses(chunk_tokens, 0.5f);
  for (const double norm : {0.0, -1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    const std::vector<double> norms{0, norm};
    const kept_range kept =
        refreekv::detail::stop(scan, 100, norms.data(), inside.data(), masses.data());
    CHECK(kept.sinks == 4);
    CHECK(kept.cut == 4);
    CHECK(kept.tokens == 100);
    CHECK(kept.loss == 0);
    CHECK(kept.dropped_mass == 0);
  }
  for (const index_t tokens : {0, 3, 4}) {
    const std::vector<double> norms(chunk_tokens, 5.0);
    const kept_range kept =
        refreekv::detail::stop(scan, tokens, norms.data(), inside.data(), masses.data());
    CHECK(kept.length() == tokens);
  }
}

TEST_CASE("stop looks into the chunk where the loss crosses", "[norm_scan]") {
  // 4 sinks and two chunks; the crossing lies in the second.
  const norm_scan scan{0.1, 4, 1, {}, {}, {}};
  const index_t tokens = 4 + 2 * chunk_tokens;
  const std::vector<double> norms{0, 10, 9.5};
  std::vector<double> inside(chunk_tokens);
  std::vector<float> masses(chunk_tokens);
  for (index_t t = 0; t < chunk_tokens; ++t) {
    inside[static_cast<std::size_t>(t)] = 9.5 - 0.01 * static_cast<double>(t);
    masses[static_cast<std::size_t>(t)] = 0.001f * static_cast<float>(t);
  }
  const kept_range kept =
      refreekv::detail::stop(scan, tokens, norms.data(), inside.data(), masses.data());
  CHECK(kept.cut == 4 + chunk_tokens + 50);
  CHECK(kept.loss == Approx(0.1));
  CHECK(kept.dropped_mass == Approx(0.05));
}
