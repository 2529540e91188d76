// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/logits.hpp"

#include <map>

#include "catch.hpp"
#include "layouts.hpp"

using namespace refreekv;

namespace {

template <class Query, class Key>
void check_products(random_source& random) {
  using product = cpu_detail::product<Query, Key>;
  for (const index_t dim : {1, 3, 16, 31, 64, 80, 96, 112, 128, 192, 300, 2100}) {
    for (const index_t rows : {1, 2, 3, 4, 7, 11, 12, 13, 16}) {
      if (dim > 192 && rows != 3 && rows != 13) continue;
      std::map<index_t, std::vector<float>> of_rows;  // by range
      problem p(2, 1, dim, 1, {70});
      fill(p, random);
      round_to<Key>(p.keys.values[0]);
      std::vector<float> queries(size(rows * dim));
      for (float& q : queries) q = random.normal();
      round_to<Query>(queries);
      const bool many = cpu_detail::are_many(rows);
      std::vector<Query> elements;  // [1, row, 1, dim]
      for (const float q : queries) elements.push_back(to_element<Query>(q));
      std::vector<std::byte> packed(size(cpu_detail::packed_bytes<product>(rows, dim)));
      const dense_cache<Key> a_key(plain_rows(1, dim, {1}));
      cpu_detail::pack_queries(
          observe(view<const Query, 4>(elements.data(), {1, rows, 1, dim}), a_key.source()), 0, 0,
          rows, {packed.data(), many});
      for_each_layout<Key>(p.keys, [&](const char* layout, const auto& cache) {
        CAPTURE(layout, dim, rows);
        for (const token_range range : {token_range{0, 70}, {0, 1}, {3, 10}, {64, 70}, {5, 5}}) {
          std::vector<std::byte> gathered(size(cpu_detail::gathered_bytes<Key>(dim)));
          std::vector<float> tile(size(rows * cpu_detail::tile_stride), -7);
          const auto source = cache.source();
          const cpu_detail::chunk_place block{0, 1, range};
          const cpu_detail::chunk_addresses keys(source, block, {0, 0, {2, 30}});
          REQUIRE(keys.count() == range.end - range.begin);
          cpu_detail::store_logits<product>(keys, {packed.data(), many}, rows, dim, 0.5f,
                                            gathered.data(), tile.data());
          // The first layout's bits are those of all.
          const auto expected = of_rows.try_emplace(range.begin * 100 + range.end, tile).first;
          for (index_t r = 0; r < rows; ++r) {
            const index_t first = r * cpu_detail::tile_stride;
            REQUIRE(std::equal(&tile[size(first)], &tile[size(first + keys.count())],
                               &expected->second[size(first)]));
          }
          const index_t together = many ? cpu_detail::block_tokens : cpu_detail::tile_tokens;
          const index_t written = (keys.count() + together - 1) / together * together;
          for (index_t r = 0; r < rows; ++r) {
            for (index_t t = 0; t < cpu_detail::tile_stride; ++t) {
              const float got = tile[size(r * cpu_detail::tile_stride + t)];
              if (t >= keys.count()) {
                REQUIRE((t < written || got == -7));
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
              REQUIRE(std::abs(2 * double{got} - dot) <=
                      static_cast<double>(dim + 1) * 0x1p-24 * scale);
            }
          }
        }
      });
    }
  }
}

}  // namespace

TEST_CASE("dot products are right for every type, size of tile, head and run", "[cpu][logits]") {
  random_source random(base_seed());
  INFO("REFREEKV_SEED=" << base_seed());
  check_products<float, float>(random);
  check_products<Eigen::half, Eigen::half>(random);
  check_products<Eigen::bfloat16, Eigen::bfloat16>(random);
  check_products<float, Eigen::bfloat16>(random);
  check_products<bf16_bits, f16_bits>(random);
}

TEST_CASE("keys are asked for in time, over the ends of blocks", "[cpu][logits]") {
  for (const index_t dim : {1, 20, 5000}) {
    const plain_rows rows(2, dim, {90, 0, 7});
    for_each_layout<Eigen::half>(rows, [&](const char* layout, const auto& cache) {
      const auto source = cache.source();
      const cpu_detail::chunk_place block{0, 1, {2, 71}};
      for (const cpu_detail::chunk_place& next :
           {cpu_detail::chunk_place{0, 1, {71, 90}}, {2, 0, {0, 7}}, {1, 0, {0, 0}}}) {
        CAPTURE(layout, dim, next.sequence);
        const cpu_detail::chunk_addresses keys(source, block, next);
        std::vector<const Eigen::half*> expected;
        for (const auto& b : {block, next}) {
          for (index_t t = b.tokens.begin; t < b.tokens.end; ++t) {
            expected.push_back(source.run_at(b.sequence, b.kv_head, t).data);
          }
          // Whole tiles, and the last key again where there is no other.
          while (expected.size() % 4 != 0) expected.push_back(expected.back());
        }
        const index_t soon = std::min<index_t>(4096 / (2 * dim), 128);
        const index_t later = std::min<index_t>(16384 / (2 * dim), 128);
        expected.resize(size(72 + later), expected.back());
        const auto at = keys.from(0);
        for (index_t i = 0; i < 72; ++i) {
          REQUIRE(at.current[i] == expected[size(i)]);
          REQUIRE(at.prefetch_near[i] == expected[size(i + soon)]);
          REQUIRE(at.prefetch_far[i] == expected[size(i + later)]);
        }
      }
    });
  }
}

TEST_CASE("queries are packed from the last rows of any strides and type", "[cpu][logits]") {
  std::vector<Eigen::half> q(2 * 3 * 4 * 8);
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = Eigen::half(static_cast<float>(i));
  const plain_rows rows(2, 8, {5, 5});
  const dense_cache<float> keys(rows);
  // [sequence, window, q_head, dim] of a tensor [dim, q_head, window, sequence]
  const view<const Eigen::half, 4> queries(q.data(), {2, 3, 4, 8}, {1, 2, 6, 24});
  const auto layer = observe(queries, keys.source());
  using product = cpu_detail::product_of<std::remove_const_t<decltype(layer)>>;
  static_assert(std::is_same_v<product::packed, float>);
  // Two heads of two rows make four, tile by tile; head 2 is the first of its KV head.
  const index_t dim = cpu_detail::packed_dim<product>(8);
  std::vector<float> packed(size(4 * dim), -7);
  cpu_detail::pack_queries(layer, 1, 2, 2, {packed.data(), false});
  cpu_detail::pack_queries(layer, 1, 3, 2, {packed.data(), false});
  for (index_t row = 0; row < 4; ++row) {
    const index_t tile = std::min<index_t>(cpu_detail::tile_rows, 4);
    for (index_t d = 0; d < dim; ++d) {
      const index_t i = row / tile * tile * dim +
                        (d / product::dims * tile + row % tile) * product::dims + d % product::dims;
      const index_t expected = 1 + 2 * (1 + row % 2) + 6 * (2 + row / 2) + 24 * d;
      CHECK(packed[size(i)] == (d < 8 ? static_cast<float>(expected) : 0.0f));
    }
  }
}

TEST_CASE("logits are capped, biased and masked in this order", "[cpu][logits]") {
  const std::vector<float> slopes{0.0f, 0.25f};
  layer_info<> info;
  info.attention.scale = 0.5f;
  info.attention.soft_cap = 10;
  info.attention.sliding_window = 6;
  info.attention.alibi_slopes = {slopes.data(), {2}};
  const query_window window{20, 4, 6};
  std::vector<float> x(10, 0.5f * 30);
  cpu_detail::finish_logits(info.attention, window, 1, 2, {8, 18},
                            x.data());  // the query of position 18
  for (index_t t = 8; t < 18; ++t) {
    const double capped = 10 * std::tanh(0.5 * 30 / 10) + 0.25 * static_cast<double>(t - 18);
    if (18 - t < 6) {
      CHECK(x[size(t - 8)] == Approx(capped));
    } else {
      CHECK(x[size(t - 8)] == -std::numeric_limits<float>::infinity());
    }
  }
}

TEST_CASE("a soft cap of any size is tanh, and keeps NaN", "[cpu][logits]") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  for (const float cap : {1e-3f, 0.5f, 50.0f, 1e4f, 1e9f, 1e12f, 1e16f, 1e18f, 1e30f, 3e38f}) {
    std::vector<float> x{0, 1e-30f, -0.1f, 3, -40, 1e4f, 1e30f, 3e38f, -3e38f, inf, -inf, nan};
    for (int i = 0; i < 100; ++i) x.push_back(0.37f * static_cast<float>(i - 50));
    // About where the cap is felt, and where the series ends.
    for (int i = 0; i < 100; ++i) x.push_back(cap * 0.04f * static_cast<float>(i - 50));
    for (int i = 0; i < 30; ++i) x.push_back(cap * 1e-4f * static_cast<float>(i - 15));
    std::vector<float> capped = x;
    cpu_detail::apply_soft_cap(capped.data(), static_cast<index_t>(x.size()), double{cap});
    for (std::size_t i = 0; i < x.size(); ++i) {
      CAPTURE(cap, x[i]);
      const long double y = static_cast<long double>(x[i]) / cap, exact = cap * std::tanh(y);
      const float alone = detail::soft_capped(x[i], double{cap}, 1 / double{cap},
                                              std::exp(double{x[i]} * (2 / double{cap})));
      for (const float got : {capped[i], alone}) {
        if (std::isnan(x[i])) {
          REQUIRE(std::isnan(got));
        } else {
          const long double rounding = std::max(0x1p-24L * std::abs(exact), 0x1p-150L);
          REQUIRE(std::abs(static_cast<long double>(got) - exact) <= rounding * (1 + 1e-4L));
        }
      }
    }
  }
}
