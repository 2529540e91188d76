// SPDX-License-Identifier: Apache-2.0
#include "refreekv/policy/streaming_llm.hpp"

#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>

#include "layouts.hpp"
#include "selection.hpp"

using namespace refreekv;

namespace {

std::vector<position_t> kept(const policy::streaming_llm& policy, index_t tokens) {
  const kept_range range = policy(tokens);
  std::vector<position_t> out(static_cast<std::size_t>(range.length()));
  index_t offsets[2];
  write_positions(&range, 1, out.data(), offsets);
  return out;
}

/// Returns the slots that the published method keeps. If it keeps none, the newest slot stays
/// (ours).
std::vector<position_t> published(index_t tokens, index_t sinks, index_t recent, index_t room) {
  std::vector<position_t> slots(static_cast<std::size_t>(tokens));
  std::iota(slots.begin(), slots.end(), 0);
  if (tokens + room <= sinks + recent) return slots;
  std::vector<position_t> out;
  for (const position_t t : slots) {
    if (t < sinks || t >= std::max(sinks, tokens - recent + room)) out.push_back(t);
  }
  if (out.empty() && tokens > 0) out.push_back(slots.back());
  return out;
}

}  // namespace

TEST_CASE("the toy data of the released code comes out", "[streaming_llm][golden]") {
  std::ifstream file(std::string(REFREEKV_GOLDEN_DIR) + "/policies.json");
  const nlohmann::json golden = nlohmann::json::parse(file).at("streaming");
  const auto expect = [&](const char* name, const std::vector<position_t>& positions) {
    INFO(name);
    CHECK(positions == golden.at(name).get<std::vector<position_t>>());
  };
  expect("call_4_5", kept({.sinks = 4, .budget = 9}, 12));
  expect("call_fits", kept({.sinks = 4, .budget = 9}, 9));
  expect("evict_for_space_3", kept({.sinks = 4, .budget = 9, .incoming = 3}, 12));
  expect("evict_for_space_9", kept({.sinks = 4, .budget = 9, .incoming = 9}, 12));
  // kvpress keeps int(n * (1 - ratio)) tokens, which is a budget in tokens.
  expect("kvpress_0_5", kept({.sinks = 4, .budget = 6}, 12));
  expect("kvpress_0_3", kept({.sinks = 4, .budget = 8}, 12));
}

TEST_CASE("every length, budget and room follows the published rule", "[streaming_llm]") {
  for (count_t sinks = 0; sinks <= 5; ++sinks) {
    for (count_t recent = 0; recent <= 8; ++recent) {
      for (count_t room = 0; room <= 12; ++room) {
        for (index_t tokens = 0; tokens <= 20; ++tokens) {
          CAPTURE(sinks, recent, room, tokens);
          const policy::streaming_llm policy{sinks, sinks + recent, room};
          REQUIRE(kept(policy, tokens) == published(tokens, sinks, recent, room));
        }
      }
    }
  }
}

TEST_CASE("decoding keeps the length at the budget", "[streaming_llm]") {
  const policy::streaming_llm policy{.sinks = 4, .budget = 24};
  index_t length = 0;
  for (int step = 0; step < 100; ++step) {
    length = policy(length + 1).length();
    CHECK(length == std::min(step + 1, 24));
  }
}

TEST_CASE("select needs neither queries nor a workspace", "[streaming_llm]") {
  const plain_rows rows(2, 4, {30, 3, 0});
  const dense_cache<float> cache(rows);
  const policy::streaming_llm policy{.sinks = 4, .budget = 14};
  const selection s = run_select(policy, divided<1>(), observe(cache.source()));
  REQUIRE(s.status == status::ok);
  CHECK(s.at(0).cut == 20);
  CHECK(s.at(1).dropped() == 0);
  CHECK(s.at(2).length() == 0);
}
