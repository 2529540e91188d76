// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/norm_scan.hpp"

#include "catch.hpp"
#include "layouts.hpp"

using namespace refreekv;

TEST_CASE("folding sums the KV heads of each sequence in place", "[cpu][norm_scan]") {
  for (const index_t sequences : {0, 1, 3}) {
    for (const index_t heads : {1, 2, 5}) {
      std::vector<double> partial(size(sequences * heads * 4));
      for (std::size_t i = 0; i < partial.size(); ++i) partial[i] = static_cast<double>(i * i);
      std::vector<double> expected(size(sequences * 4));
      for (std::size_t i = 0; i < partial.size(); ++i) {
        expected[i / (4 * size(heads)) * 4 + i % 4] += partial[i];
      }
      std::vector<double> folded = partial;
      const auto add = [](double a, double b) { return a + b; };
      cpu_detail::fold_groups(folded.data(), sequences, heads, 1, 4, add);
      folded.resize(expected.size());
      CHECK(folded == expected);
      std::vector<double> same = partial;
      cpu_detail::fold_groups(same.data(), sequences, heads, heads, 4, add);
      CHECK(same == partial);
    }
  }
}

TEST_CASE("a dominant sink does not drown the candidates", "[cpu][norm_scan]") {
  // The sink's logit is 300 above the others': candidates have attention of 1e-130 each.
  problem p(1, 1, 2, 1, {500});
  p.scale = 1;
  p.query(0, 0, 0, 0) = 1;
  for (index_t t = 0; t < 500; ++t) p.keys.at(0, 0, t, 0) = t == 0 ? 300.0f : 0.0f;
  const dense_cache<float> keys(p.keys);
  const auto seen = observe(p.query_view(), keys.source(), p.info());
  const policy::refreekv rule{.threshold = 0.5};
  std::vector<std::byte> scratch(workspace_size(rule, cpu_backend{}, seen));
  kept_range kept;
  REQUIRE(select(rule, cpu_backend{}, seen, view(&kept, {1, 1}), scratch) == status::ok);
  // Uniform over 496 candidates: a quarter of them, 124, hold half of the norm.
  CHECK(kept.length() == 4 + 124);
}
