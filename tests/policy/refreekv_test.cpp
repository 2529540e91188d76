// SPDX-License-Identifier: Apache-2.0
#include "refreekv/policy/refreekv.hpp"

#include <fstream>
#include <nlohmann/json.hpp>

#include "layouts.hpp"
#include "selection.hpp"

using namespace refreekv;

namespace {

nlohmann::json toy_data() {
  std::ifstream file(std::string(REFREEKV_GOLDEN_DIR) + "/policies.json");
  return nlohmann::json::parse(file);
}

std::vector<position_t> positions(const kept_range& kept) {
  std::vector<position_t> out(static_cast<std::size_t>(kept.length()));
  index_t offsets[2];
  write_positions(&kept, 1, out.data(), offsets);
  return out;
}

}  // namespace

TEST_CASE("the defaults are the paper's", "[refreekv]") {
  const policy::refreekv policy;
  CHECK(policy.threshold == 0.01);
  CHECK(policy.sinks == 4);
  CHECK(policy.window == 1);
  CHECK(policy.average == row_average::mean);
  CHECK(policy.norm == norm_scope::candidates);
  CHECK(policy.scope == cut_scope::layer);
  CHECK(policy.full_layers == 2);
  CHECK(why_invalid(policy) == nullptr);
}

TEST_CASE("the position-ranked toy data of the released code comes out", "[refreekv][golden]") {
  // The last attention rows of two heads, [head, token], as integers (12 tokens).
  const float weights[2][12] = {{62, 32, 2, 6, 3, 8, 4, 31, 6, 26, 7, 25},
                                {62, 7, 1, 4, 1, 1, 8, 31, 8, 3, 4, 27}};
  std::vector<float> rows;
  for (const auto& head : weights) {
    float sum = 0;
    for (const float w : head) sum += w;
    for (const float w : head) rows.push_back(w / sum);
  }
  const nlohmann::json golden = toy_data();
  for (const char* threshold : {"0.01", "0.05", "0.2"}) {
    const std::string name = std::string("refreekv_position_T") + threshold;
    INFO(name);
    const policy::refreekv policy{.threshold = std::stod(threshold), .full_layers = 0};
    const selection s =
        run_select(policy, divided<1>(), observe_rows(view(rows.data(), {1, 1, 2, 12}), 2));
    REQUIRE(s.status == status::ok);
    CHECK(positions(s.at(0)) == golden.at(name).at("kept").get<std::vector<position_t>>());
  }
}

TEST_CASE("a larger threshold never keeps more, and a full row never keeps more than candidates",
          "[refreekv]") {
  for (unsigned seed = base_seed(); seed < base_seed() + 30; ++seed) {
    INFO("REFREEKV_SEED=" << seed);
    random_source random(seed);
    problem p(2, 2, 16, 2, {static_cast<position_t>(random.between(5, 600))});
    fill(p, random);
    const dense_cache<float> keys(p.keys);
    const auto layer = observe(p.query_view(), keys.source(), p.info());
    for (const count_t window : {1u, 2u}) {
      position_t last = 0;
      for (const double threshold : {0.0, 0.001, 0.01, 0.1, 0.5, 1.0}) {
        policy::refreekv policy{.threshold = threshold, .window = window};
        const kept_range kept = run_select(policy, divided<1>(), layer).at(0);
        CHECK(kept.cut >= last);
        last = kept.cut;
        // A cut never drops a sink, so the sinks' energy only adds to the norm that remains.
        policy.norm = norm_scope::full_row;
        CHECK(run_select(policy, divided<1>(), layer).at(0).cut >= kept.cut);
      }
      CHECK(last == p.lengths[0] - 1);
    }
  }
}

TEST_CASE("a window wider than the sequence is the sequence", "[refreekv]") {
  random_source random(base_seed());
  problem p(1, 2, 16, 40, {40, 25});
  fill(p, random);
  const dense_cache<float> keys(p.keys);
  const auto layer = observe(p.query_view(), keys.source(), p.info());
  for (const row_average average : {row_average::mean, row_average::frobenius}) {
    const policy::refreekv all{.threshold = 0.2, .window = 40, .average = average};
    const policy::refreekv more{.threshold = 0.2, .window = 5000, .average = average};
    for (index_t s = 0; s < 2; ++s) {
      CHECK(run_select(all, divided<1>(), layer).at(s).cut ==
            run_select(more, divided<1>(), layer).at(s).cut);
    }
  }
}
