// SPDX-License-Identifier: Apache-2.0
// The faithful rule's bodies where there is more of everything than a block goes through at once,
// and how stand-ins are rounded.
#include <optional>

#include "refreekv/cpu/simd/element.hpp"
#include "valued_selection.hpp"

using namespace refreekv;

namespace {

constexpr index_t value_dim = 5;

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0, norm = 0;
  for (std::size_t d = 0; d < a.size(); ++d) {
    sum += std::pow(double{a[d]} - double{b[d]}, 2);
    norm += std::pow(double{a[d]}, 2);
  }
  return std::sqrt(sum) / (std::sqrt(norm) + 0.05);
}

/// Decisions that agree as far as floats do.
void check_same(const valued_selection& ours, const valued_selection& theirs) {
  REQUIRE(ours.status == status::ok);
  REQUIRE(theirs.status == status::ok);
  CHECK(ours.counts == theirs.counts);
  REQUIRE(ours.kept.size() == theirs.kept.size());
  for (std::size_t h = 0; h < ours.kept.size(); ++h) {
    CHECK(ours.kept[h] == theirs.kept[h]);
    REQUIRE(ours.keys[h].size() == theirs.keys[h].size());
    for (std::size_t i = 0; i < ours.keys[h].size(); ++i) {
      CHECK(distance(ours.keys[h][i], theirs.keys[h][i]) <= 1e-4);
      CHECK(distance(ours.values[h][i], theirs.values[h][i]) <= 1e-4);
    }
  }
}

/// A random problem, and random values of dimension value_dim.
struct valued_problem {
  valued_problem(index_t kv_heads, index_t group, index_t dims, index_t window,
                 std::vector<position_t> lengths, unsigned seed)
      : p(kv_heads, group, dims, window, lengths), values(kv_heads, value_dim, lengths) {
    random_source random(seed);
    fill(p, random);
    for (auto& rows : values.values) {
      for (float& x : rows) x = random.normal();
    }
    keys.emplace(p.keys);
    value_cache.emplace(values);
  }
  auto layer() const {
    return with_values(observe(p.query_view(), keys->source(), p.info()), value_cache->source());
  }

 private:
  problem p;
  plain_rows values;
  std::optional<dense_cache<float>> keys, value_cache;
};

}  // namespace

TEST_CASE("kernels of faithful agree with the CPU on long sequences", "[cuda]") {
  const valued_problem given(2, 2, 8, 6, {4500, 37}, base_seed());
  const auto layer = given.layer();
  for (const cut_scope scope : {cut_scope::kv_head, cut_scope::layer}) {
    for (const bool error_term : {true, false}) {
      INFO("scope " << static_cast<int>(scope) << ", error term " << error_term);
      const policy::faithful policy{.tolerance = error_term ? 0.3 : 0.5,
                                    .block = scope == cut_scope::layer ? 2u : 16u,
                                    .error_term = error_term,
                                    .scope = scope};
      const valued_selection ours = run_valued(policy, divided<1>(), layer);
      check_same(ours, run_valued(policy, cpu_backend{}, layer));
      CHECK(run_valued(policy, divided<7>(), layer) == ours);
      CHECK(ours.keys[0].size() > 256);
    }
  }
}

TEST_CASE("kernels of faithful agree with the CPU on regressions of every order", "[cuda]") {
  struct shape {
    index_t dims, group, window;
  };
  // Of rows or of dimensions, of which the fewer count, in registers and in memory.
  for (const auto& [dims, group, window] :
       {shape{150, 8, 20}, shape{150, 3, 10}, shape{100, 8, 20}, shape{128, 4, 32}}) {
    INFO(dims << " dimensions, " << group * window << " rows");
    const valued_problem given(1, group, dims, window, {200, 9}, base_seed());
    const auto layer = given.layer();
    const policy::faithful policy{.tolerance = 0.3};
    const valued_selection ours = run_valued(policy, divided<1>(), layer);
    check_same(ours, run_valued(policy, cpu_backend{}, layer));
    CHECK(run_valued(policy, divided<7>(), layer) == ours);
    CHECK(!ours.keys[0].empty());
  }
}

TEST_CASE("stand-ins are rounded as on the CPU", "[cuda]") {
  random_source random(base_seed());
  const auto check = [](float x) {
    INFO(x);
    const auto half = cpu_detail::narrow<f16_bits>(x);
    const auto bf16 = cpu_detail::narrow<bf16_bits>(x);
    if (std::isnan(x)) {
      CHECK(std::isnan(cuda_detail::widen(f16_bits{cuda_detail::half_bits(x)})));
      CHECK(std::isnan(cuda_detail::widen(bf16_bits{cuda_detail::bf16_bits_of(x)})));
    } else {
      CHECK(cuda_detail::half_bits(x) == half.bits);
      CHECK(cuda_detail::bf16_bits_of(x) == bf16.bits);
    }
  };
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (const float x : {0.0f, 65504.0f, 65519.0f, 65520.0f, 3.4e38f, infinity, 0x1p-24f, 0x1p-25f,
                        0x1.8p-25f, 0x1p-14f, 0x1.ffcp-15f, 0x1.ffep-15f, 0x1.004p0f, 0x1.00cp0f,
                        0x1.01p0f, 0x1.03p0f, 0x1.fep127f, 1e-40f, std::nanf("")}) {
    check(x);
    check(-x);
  }
  for (int i = 0; i < 20000; ++i) {
    const auto bits = static_cast<std::uint32_t>(random.between(0, 0x7fffffff));
    check(std::bit_cast<float>(bits));
    // Where halves are.
    check(std::bit_cast<float>(bits % (48u << 23) + (96u << 23)));
  }
}
