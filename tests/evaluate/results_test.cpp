// SPDX-License-Identifier: Apache-2.0
#include "results.hpp"

#include "catch.hpp"

using namespace evaluate;

namespace {

// A row with these mean KL of prompts, the largest of any token twice that.
result_row row_of(const std::vector<double>& kl, std::optional<std::size_t> reference = {}) {
  result_row row{"tova", "", "", reference, "", {}};
  for (const double each : kl) row.of_prompts.push_back({0.5, {each, 2 * each, 1}, 1, 0.25, 8});
  return row;
}

}  // namespace

TEST_CASE("rows are summed up over their prompts", "[evaluate]") {
  results all;
  for (const std::size_t compared : {1u, 1u, 2u}) {
    all.prompts.push_back({"", 100, compared, false, false});
  }
  all.rows = {row_of({0.2, 0.4, 0.1}), row_of({0.3, 0.4, 0.0}, 0)};
  const measurement mean = all.mean(all.rows[0]);
  CHECK(mean.against_full.mean_kl == Approx((0.2 + 0.4 + 2 * 0.1) / 4));
  CHECK(mean.against_full.largest_kl == 0.8);
  CHECK(mean.kept_fraction == 0.5);
  CHECK(mean.keys == 3);
  CHECK(all.median_kl(all.rows[0]) == 0.2);
  CHECK(all.farther(all.rows[1]) == 1);

  all.prompts.pop_back();
  all.rows[0].of_prompts.pop_back();
  CHECK(all.median_kl(all.rows[0]) == Approx(0.3));
}
