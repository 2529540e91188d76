// SPDX-License-Identifier: Apache-2.0
// faithful keeps the same positions and computes the same stand-ins as an independent program.
#include "golden_policies.hpp"
#include "valued_selection.hpp"

namespace {

using golden::json;
namespace policy = refreekv::policy;

constexpr index_t kv_heads = 2, group = 2, window = 8, tokens = 160, dims = 8;

float number(std::uint32_t tag, index_t i) {
  return static_cast<float>(toy::mix(tag * 1000003u + static_cast<std::uint32_t>(i)) % 4096) /
             2048 -
         1;
}

/// The layer of golden/faithful.json. All its numbers are exact in float.
struct golden_layer {
  std::vector<float> queries, keys, values;  // [row, q_head, dim], [kv_head, token, dim]

  golden_layer() : queries(size(kv_heads * group * window * dims)) {
    for (index_t i = 0; i < kv_heads * tokens * dims; ++i) {
      const index_t h = i / (tokens * dims), t = i / dims % tokens, d = i % dims;
      keys.push_back((number(11, i) + (d == 0 ? 1.5f : 0)) * (h == 1 ? 2.0f : 1.0f) *
                     (t == 0 ? 4.0f : 1.0f));
      values.push_back(number(12, i) * (h == 1 ? 0.5f : 1.0f) * (t == 0 ? 0.125f : 1.0f));
    }
    for (index_t i = 0; i < kv_heads * group * window * dims; ++i) {
      const index_t q_head = i / (window * dims), r = i / dims % window, d = i % dims;
      queries[size((r * kv_heads * group + q_head) * dims + d)] =
          number(13, i) * 2 + (d == 0 ? 1.0f : 0);
    }
  }

  auto layer() {
    using refreekv::dense, refreekv::view;
    return refreekv::with_values(
        refreekv::observe(view<const float, 4>(queries.data(), {1, window, kv_heads * group, dims}),
                          dense(view<float, 4>(keys.data(), {1, kv_heads, tokens, dims}))),
        dense(view<float, 4>(values.data(), {1, kv_heads, tokens, dims})));
  }
};

/// Checks that each row is within 1e-4 of the norm of the expected row.
void check_rows(const float_rows& ours, const json& theirs) {
  REQUIRE(ours.size() == theirs.size());
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const auto expected = theirs[i].get<std::vector<double>>();
    double distance = 0, norm = 0;
    for (std::size_t d = 0; d < expected.size(); ++d) {
      distance += std::pow(double{ours[i][d]} - expected[d], 2);
      norm += expected[d] * expected[d];
    }
    CHECK(std::sqrt(distance) <= 1e-4 * std::sqrt(norm));
  }
}

}  // namespace

TEST_CASE("faithful keeps what its reference keeps", "[golden]") {
  const char* folder = std::getenv("REFREEKV_GOLDEN");
  const std::filesystem::path path = folder != nullptr ? folder : REFREEKV_GOLDEN_DIR;
  std::ifstream file(path / "faithful.json");
  REQUIRE(file);
  const json golden = json::parse(file);
  golden_layer layer;
  REQUIRE(golden["spot"]["K[1,0]"].get<std::vector<float>>() ==
          std::vector<float>(&layer.keys[tokens * dims], &layer.keys[tokens * dims + dims]));
  REQUIRE(golden["spot"]["Q[0,0,0]"].get<std::vector<float>>() ==
          std::vector<float>(&layer.queries[0], &layer.queries[dims]));
  REQUIRE(golden["cases"].size() == 6);
  for (const json& entry : golden["cases"]) {
    const policy::faithful policy{.tolerance = entry["tolerance"],
                                  .window = window,
                                  .last_row = 0,
                                  .error_term = entry["error_term"]};
    INFO("tolerance " << policy.tolerance << ", error term " << policy.error_term);
    const valued_selection ours = run_valued(policy, divided<1>(), layer.layer());
    REQUIRE(ours.status == refreekv::status::ok);
    CHECK(run_valued(policy, divided<7>(), layer.layer()) == ours);
    CHECK(ours.kept == entry["kept"].get<golden::kept_heads>());
    for (std::size_t h = 0; h < size(kv_heads); ++h) {
      const json& stand_ins = entry["stand_ins"][h];
      check_rows(ours.keys[h], stand_ins.is_null() ? json::array() : stand_ins["keys"]);
      check_rows(ours.values[h], stand_ins.is_null() ? json::array() : stand_ins["values"]);
    }
  }
}
