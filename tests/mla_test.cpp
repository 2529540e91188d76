// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention as DeepSeek has it: one KV head for 128 query heads, keys of 576
// elements, the first 512 of which are the values.
#include "layouts.hpp"
#include "ranked_selection.hpp"
#include "selection.hpp"

using namespace refreekv;

namespace {

constexpr index_t q_heads = 128, head_dim = 576, value_dim = 512;
constexpr float scale = 0.1352337788f;  // of DeepSeek-V2-Lite: 192^-1/2 * mscale^2, not 576^-1/2

struct latent_layer {
  problem shape;
  std::vector<bf16_bits> cache;  // [token, head_dim]
  std::vector<bf16_bits> before;

  latent_layer(position_t tokens, index_t window)
      : shape(1, q_heads, head_dim, window, {tokens}), cache(size(tokens * head_dim)) {
    random_source random(base_seed() + static_cast<unsigned>(tokens));
    shape.scale = scale;
    for (float& q : shape.queries) q = random.normal();
    for (index_t r = 0; r < window; ++r) {
      for (index_t h = 0; h < q_heads; ++h) shape.query(0, r, h, 0) = 20;
    }
    for (index_t t = 0; t < tokens; ++t) {
      for (index_t d = 0; d < head_dim; ++d) shape.keys.at(0, 0, t, d) = random.normal();
      shape.keys.at(0, 0, t, 0) += 8 * static_cast<float>(t) / static_cast<float>(tokens);
    }
    round_to<bf16_bits>(shape.keys.values[0]);
    for (std::size_t i = 0; i < cache.size(); ++i) {
      cache[i] = to_element<bf16_bits>(shape.keys.values[0][i]);
    }
    before = cache;
  }
  index_t tokens() const { return shape.lengths[0]; }
  auto keys() { return dense(view(cache.data(), {1, 1, tokens(), head_dim})); }
  auto values() {
    return dense(view(cache.data(), {1, 1, tokens(), value_dim}, {0, 0, head_dim, 1}));
  }
  auto observed() { return observe(shape.query_view(), keys(), shape.info()); }

  bool is_row(index_t slot, index_t token) const {
    return std::memcmp(cache.data() + slot * head_dim, before.data() + token * head_dim,
                       size(head_dim) * sizeof(bf16_bits)) == 0;
  }
  bool unwritten() const {
    return std::memcmp(cache.data(), before.data(), cache.size() * sizeof(bf16_bits)) == 0;
  }
};

}  // namespace

TEST_CASE("a latent cache is decided on, and compacted as keys alone", "[mla]") {
  const auto [tokens, window, average] =
      GENERATE(std::tuple<position_t, index_t, row_average>{300, 1, row_average::mean},
               std::tuple<position_t, index_t, row_average>{600, 3, row_average::frobenius},
               std::tuple<position_t, index_t, row_average>{20, 32, row_average::mean});
  latent_layer cache(tokens, window);
  const policy::refreekv policy{.window = static_cast<count_t>(window), .average = average};
  const selection s = run_select(policy, divided<2>(), cache.observed());
  const auto expected = reference::decide(reference::attend(cache.shape, 0), 0, q_heads, policy);
  CHECK(reference::disagreement(s.at(0), expected, policy.threshold) == "");
  if (tokens > 100) {
    REQUIRE(s.at(0).dropped() > 10);
    REQUIRE(s.at(0).length() > 10);
  }

  for (const compaction mode : {compaction::sinks_up, compaction::suffix_down}) {
    latent_layer pruned(tokens, window);
    kept_range kept;
    std::vector<std::byte> scratch(workspace_size(policy, divided<2>(), pruned.observed()));
    REQUIRE(prune(policy, divided<2>(), pruned.observed(), {&kept, {1, 1}}, scratch, mode) ==
            status::ok);
    CHECK(kept == s.at(0));
    index_t slot = first_slot(kept, mode);
    for (index_t t = 0; t < tokens; ++t) {
      if (kept.keeps(t)) CHECK(pruned.is_row(slot++, t));
    }
  }
}

TEST_CASE("values that are a part of each key are refused, in words and before anything is written",
          "[mla]") {
  latent_layer cache(40, 8);
  const auto layer = cache.observed();
  const auto keys = cache.keys();
  const auto values = cache.values();
  const auto says = [](const char* why) {
    return std::string(why == nullptr ? "" : why).find("pass the keys alone") != std::string::npos;
  };
  const auto mode = GENERATE(compaction::sinks_up, compaction::suffix_down);
  std::vector<std::byte> scratch(1 << 22);

  kept_range range{-7, -7, -7};
  const policy::refreekv policy;
  const view<kept_range, 2> ranges(&range, {1, 1});
  CHECK(says(why_invalid(policy, layer, ranges, values)));
  CHECK(prune(policy, divided<1>(), layer, ranges, scratch, mode, values) ==
        status::invalid_argument);
  CHECK(range.cut == -7);

  guarded_positions guarded(1, 1, 40);
  const policy::snapkv snapkv{.budget = 16, .window = 8};
  CHECK(says(why_invalid(snapkv, layer, guarded.kept(), values)));
  CHECK(prune(snapkv, divided<1>(), layer, guarded.kept(), scratch, mode, values) ==
        status::invalid_argument);
  CHECK(guarded.unwritten());

  range = {4, 30, 40};
  CHECK(says(why_invalid(ranges, mode, keys, values)));
  CHECK(compact(divided<1>(), ranges, mode, values, keys) == status::invalid_argument);
  CHECK(cache.unwritten());
}
