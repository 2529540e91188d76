// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/logits.hpp"

#include "catch.hpp"
#include "layouts.hpp"

using namespace refreekv;

TEST_CASE("dot products are right for every size of tile, head and run", "[cpu][logits]") {
  random_source random(base_seed());
  for (const index_t dim : {1, 3, 16, 31, 64, 96}) {
    for (const index_t rows : {1, 3, 4, 9}) {
      problem p(2, 1, dim, 1, {70});
      fill(p, random);
      round_to<Eigen::bfloat16>(p.keys.values[0]);
      std::vector<float> queries(size(rows * dim));
      for (float& q : queries) q = random.normal();
      for_each_layout<Eigen::bfloat16>(p.keys, [&](const char* layout, const auto& cache) {
        CAPTURE(layout, dim, rows);
        for (const token_range range : {token_range{0, 70}, {0, 1}, {3, 10}, {64, 70}, {5, 5}}) {
          std::vector<float> gathered(size(cpu_detail::gather_tokens * dim));
          std::vector<float> tile(size(rows * chunk_tokens), -7);
          cpu_detail::dot_range(cache.source(), 0, 1, range, queries.data(), rows, gathered.data(),
                                tile.data());
          for (index_t r = 0; r < rows; ++r) {
            for (index_t t = 0; t < chunk_tokens; ++t) {
              const float got = tile[size(r * chunk_tokens + t)];
              if (range.begin + t >= range.end) {
                REQUIRE(got == -7);
                continue;
              }
              double dot = 0, scale = 0;
              for (index_t d = 0; d < dim; ++d) {
                const double term = double{queries[size(r * dim + d)]} *
                                    double{p.keys.at(0, 1, range.begin + t, d)};
                dot += term;
                scale += std::abs(term);
              }
              // dim additions and products, each within 2^-24 of the terms' sizes.
              REQUIRE(std::abs(double{got} - dot) <=
                      static_cast<double>(dim + 1) * 0x1p-24 * scale);
            }
          }
        }
      });
    }
  }
}

TEST_CASE("queries are packed from the last rows of any strides and type", "[cpu][logits]") {
  std::vector<Eigen::half> q(2 * 3 * 4 * 8);
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = Eigen::half(static_cast<float>(i));
  const plain_rows rows(2, 8, {5, 5});
  const dense_cache<float> keys(rows);
  // [sequence, window, q_head, dim] of a tensor [dim, q_head, window, sequence]
  const view<const Eigen::half, 4> queries(q.data(), {2, 3, 4, 8}, {1, 2, 6, 24});
  const auto seen = observe(queries, keys.source());
  std::vector<float> packed(2 * 8);
  cpu_detail::pack_queries(seen, 1, 2, 2, packed.data());
  for (index_t r = 0; r < 2; ++r) {
    for (index_t d = 0; d < 8; ++d) {
      CHECK(packed[size(r * 8 + d)] == static_cast<float>(1 + 2 * (1 + r) + 6 * 2 + 24 * d));
    }
  }
}

TEST_CASE("logits are scaled, capped, biased and masked in this order", "[cpu][logits]") {
  const problem p(1, 2, 16, 4, {20});
  const dense_cache<float> keys(p.keys);
  const std::vector<float> slopes{0.0f, 0.25f};
  layer_info<> info;
  info.attention.scale = 0.5f;
  info.attention.soft_cap = 10;
  info.attention.sliding_window = 6;
  info.attention.alibi_slopes = {slopes.data(), {2}};
  const auto seen = observe(p.query_view(), keys.source(), info);
  const query_window window{20, 4, 6};
  std::vector<float> x(10, 30.0f);
  cpu_detail::finish_logits(seen, window, 1, 2, {8, 18}, x.data());  // the query of position 18
  for (index_t t = 8; t < 18; ++t) {
    const double capped = 10 * std::tanh(0.5 * 30 / 10) + 0.25 * static_cast<double>(t - 18);
    if (18 - t < 6) {
      CHECK(x[size(t - 8)] == Approx(capped));
    } else {
      CHECK(x[size(t - 8)] == -std::numeric_limits<float>::infinity());
    }
  }
}
