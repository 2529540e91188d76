// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/compact.hpp"

#include "catch.hpp"
#include "layouts.hpp"

using namespace refreekv;

TEST_CASE("rows move as if through a buffer in every layout", "[cpu][compact]") {
  for (index_t source = 0; source <= 40; source += 5) {
    for (index_t target = 0; target <= 40; target += 3) {
      const index_t tokens = 12;
      plain_rows rows(2, 3, {53});
      for (std::size_t i = 0; i < rows.values[0].size(); ++i) {
        rows.values[0][i] = static_cast<float>(i);
      }
      for_each_layout<float>(rows, [&](const char* layout, const auto& cache) {
        CAPTURE(layout, source, target);
        const auto cells = cache.source();
        cpu_detail::move_rows(cells, 0, 1, {source, target, tokens});
        for (index_t h = 0; h < 2; ++h) {
          for (index_t t = 0; t < 53; ++t) {
            const bool moved = h == 1 && t >= target && t < target + tokens;
            const index_t from = moved ? source + t - target : t;
            const auto run = cells.run_at(0, h, t);
            for (index_t d = 0; d < 3; ++d) {
              REQUIRE(run.data[d * run.dim_stride] == rows.at(0, h, from, d));
            }
          }
        }
        REQUIRE(cache.untouched());
      });
    }
  }
}
