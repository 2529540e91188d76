// SPDX-License-Identifier: Apache-2.0
// On toy data, policies keep the same tokens as the published code of their methods.
#include "estimates.hpp"
#include "golden_policies.hpp"
#include "ranked_selection.hpp"
#include "selection.hpp"

namespace {

using namespace golden;
using reference::attention_rows;
using refreekv::pool_kind;
using refreekv::token_budget;
namespace policy = refreekv::policy;

/// Returns the tokens kept by an undivided run. A run in seven parts must keep the same tokens.
template <class Policy, class Layer>
kept_heads kept_by(const Policy& policy, const Layer& layer) {
  const ranked_selection one = run_ranked(policy, divided<1>(), layer);
  REQUIRE(one.status == refreekv::status::ok);
  CHECK(run_ranked(policy, divided<7>(), layer) == one);
  return one.kept;
}

refreekv::layer_info<> info(index_t layer) { return {.index = layer}; }

/// Checks the kept tokens twice: with the attention rows of all tokens, and with only the last
/// `window` rows.
template <class Policy>
void check_kept(const Policy& policy, index_t q_heads, index_t window, const json& expected,
                index_t layer = 0) {
  const attention_rows rows = toy::attention(q_heads, layer);
  for (const index_t shown : {toy::tokens, window}) {
    INFO(shown << " rows");
    const row_tensor tensor({rows}, shown);
    CHECK(kept_by(policy, tensor.layer(2, info(layer))) == ascending_heads(expected));
  }
}

check h2o(count_t window, token_budget budget = 6) {
  return [=](const json& entry) {
    const policy::h2o policy{.budget = budget, .recent = 3, .window = window};
    check_kept(policy, 2, std::min<index_t>(window, toy::tokens), entry);
  };
}

check snapkv(pool_kind kind, count_t width, token_budget budget = 7) {
  return [=](const json& entry) {
    const policy::snapkv policy{.budget = budget, .window = 3, .pool = {kind, width}};
    check_kept(policy, 2, 3, entry["kept"]);
  };
}

check grouped_snapkv(token_budget budget) {
  return [=](const json& entry) {
    const policy::snapkv policy{
        .budget = budget, .window = 3, .pool = {.kind = pool_kind::average, .width = 3}};
    check_kept(policy, 4, 3, entry);
  };
}

/// Decodes three tokens after the prompt. Scores are compacted like a cache.
void h2o_real_drop(const json& entry) {
  constexpr index_t capacity = 15;
  constexpr policy::h2o policy{.budget = 6, .recent = 3};
  std::vector<float> memory(2 * capacity, std::numeric_limits<float>::quiet_NaN());
  const refreekv::view<float, 4> cache(memory.data(), {1, 2, capacity, 1});
  const refreekv::view<float, 3> scores_of(memory.data(), {1, 2, capacity});
  kept_heads slots(2, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
  attention_rows rows = toy::attention(2);
  for (std::size_t step = 0; step < entry[0].size(); ++step) {
    INFO("step " << step);
    const row_tensor tensor({rows}, rows.window, 0);
    const auto layer = refreekv::with_scores(tensor.layer(2), scores_of);
    guarded_bytes scratch(refreekv::workspace_size(policy, divided<1>(), layer));
    guarded_positions kept(1, 2, rows.tokens);
    REQUIRE(refreekv::select(policy, divided<1>(), layer, kept.kept(), scratch.middle()) ==
            refreekv::status::ok);
    const auto tokens = static_cast<position_t>(rows.tokens);
    REQUIRE(refreekv::compact(divided<1>(), kept.kept(), refreekv::compaction::suffix_down,
                              refreekv::dense<float>(cache, {&tokens, {1}})) ==
            refreekv::status::ok);
    slots = at_slots(slots, {positions_of(kept.kept(), 0, 0), positions_of(kept.kept(), 0, 1)});
    for (std::size_t h = 0; h < 2; ++h) {
      CHECK(slots[h] == entry[h][step]["kept"].get<std::vector<position_t>>());
      const float* const of_head = scores_of.at(0, static_cast<index_t>(h));
      check_close(scores(of_head, of_head + slots[h].size()), entry[h][step]["score"]);
      slots[h].push_back(static_cast<position_t>(slots[h].back() + 1));
    }
    rows = toy::row_of_slots(
        slots, [&](index_t h, position_t p) { return toy::weight(0, h, slots[0].back(), p); });
  }
}

/// Compares with the tokens that each layer keeps besides the window; null means all tokens.
check pyramid(index_t tokens, policy::pyramidkv policy) {
  return [=](const json& entry) {
    attention_rows rows{1, policy.window, tokens, {}};
    rows.values.assign(size(policy.window * tokens), 1.0 / static_cast<double>(tokens));
    const row_tensor tensor({rows}, policy.window);
    REQUIRE(static_cast<index_t>(entry.size()) == policy.layers);
    for (index_t l = 0; l < policy.layers; ++l) {
      const json& expected = entry[static_cast<std::size_t>(l)];
      const auto kept = run_ranked(policy, divided<1>(), tensor.layer(1, info(l)));
      CHECK(kept.counts[0].count ==
            (expected.is_null() ? tokens : expected.get<index_t>() + policy.window));
    }
  };
}

void pyramid_budgets(const json& entry) {
  constexpr auto over_layers = policy::pyramid_step::over_layers;
  const policy::pyramidkv of_128{.budget = 128}, of_2048{.budget = 2048};
  policy::pyramidkv of_2048_over_layers = of_2048, toy_over_layers;
  of_2048_over_layers.step = over_layers;
  const policy::pyramidkv toy{.budget = 6, .window = 2, .beta = 4, .layers = 3};
  toy_over_layers = toy;
  toy_over_layers.step = over_layers;
  check_entries(entry,
                {{"C128_w8_L32_n8000", pyramid(8000, of_128)},
                 {"C2048_w8_L32_n7500", pyramid(7500, of_2048)},
                 {"C2048_w8_L32_n7500_divL", pyramid(7500, of_2048_over_layers)},
                 {"C2048_w8_L32_n4085", pyramid(4085, of_2048)},
                 {"C2048_w8_L32_n4079", pyramid(4079, of_2048)},
                 {"C2048_w8_L32_n2047", pyramid(2047, of_2048)},
                 {"C128_w8_L32_n240_clipped", pyramid(240, of_128)},
                 {"toy_n12_L3_C6_w2_beta4", pyramid(12, toy)},
                 {"toy_n12_L3_C6_w2_beta4_divL", pyramid(12, toy_over_layers)},
                 {"toy_n7_L3_C6_w2_beta4", pyramid(7, toy)}},
                {{"kvpress_n4096_L32_r05", "real-valued budgets that include the window"},
                 {"kvpress_n4096_L32_r09", "real-valued budgets that include the window"}});
}

void pyramid_kept(const json& entry) {
  const policy::pyramidkv policy{.budget = 6,
                                 .window = 2,
                                 .pool = {.kind = pool_kind::average, .width = 3},
                                 .beta = 4,
                                 .layers = 3};
  for (index_t l = 0; l < 3; ++l) {
    INFO("layer " << l);
    check_kept(policy, 2, 2, entry[static_cast<std::size_t>(l)], l);
  }
}

check attention_ranked(double threshold, count_t window) {
  return [=](const json& entry) {
    const policy::attention_ranked policy{
        .threshold = threshold, .window = window, .recent = 3, .full_layers = 0};
    check_kept(policy, 2, std::min<index_t>(window, toy::tokens), entry["kept"]);
  };
}

std::vector<position_t> positions_in(const refreekv::kept_range& kept) {
  std::vector<position_t> out;
  for (position_t t = 0; t < kept.tokens; ++t) {
    if (kept.keeps(t)) out.push_back(t);
  }
  return out;
}

template <class Policy>
std::vector<position_t> range_kept_by(const Policy& policy, position_t tokens = toy::tokens) {
  const attention_rows rows = toy::attention(2);
  const row_tensor tensor({rows}, toy::tokens, 0);
  const auto layer = refreekv::observe_rows(tensor.rows(), 2, {&tokens, {1}});
  return positions_in(run_select(policy, divided<1>(), layer).at(0));
}

check position_ranked(double threshold) {
  return [=](const json& entry) {
    const policy::refreekv policy{.threshold = threshold, .full_layers = 0};
    CHECK(range_kept_by(policy) == ascending(entry["kept"]));
  };
}

check streaming(token_budget budget, count_t room = 0, position_t tokens = toy::tokens) {
  return [=](const json& entry) {
    CHECK(range_kept_by(policy::streaming_llm{.budget = budget, .incoming = room}, tokens) ==
          ascending(entry));
  };
}

void streaming_entries(const json& entry) {
  check_entries(entry,
                {{"call_4_5", streaming(9)},
                 {"call_fits", streaming(9, 0, 9)},
                 {"evict_for_space_3", streaming(9, 3)},
                 {"evict_for_space_9", streaming(9, 9)},
                 {"kvpress_0_5", streaming(token_budget::share(0.5))},
                 {"kvpress_0_3", streaming(8)}},
                {});
}

/// Returns the tokens kept by one head with these attention probabilities [token].
std::vector<position_t> top_p_of(const policy::twilight& policy, const scores& probabilities) {
  const attention_rows rows{1, 1, static_cast<index_t>(probabilities.size()), probabilities};
  const row_tensor tensor({rows}, 1);
  return kept_by(policy, tensor.layer(1)).front();
}

void top_p_cases(const json& entry) {
  for (const json& line : entry) {
    INFO(line["name"]);
    const scores probabilities = line["probs"];
    policy::twilight policy{.mass = line["p"].get<double>(), .full_layers = 0};
    CHECK(top_p_of(policy, probabilities) == ascending(line["sort"]));
    policy.sink_start = true;
    CHECK(top_p_of(policy, probabilities) == ascending(line["kernel_official"]));
  }
}

/// A layer's scores as CAKE's caller owns them, and the positions still in the layer.
class cake_layer {
 public:
  static constexpr index_t capacity = toy::tokens + 1;

  std::vector<float> memory = std::vector<float>(2 * capacity, 0.0f);
  kept_heads slots = kept_heads(2, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});

  refreekv::view<float, 3> scores_view() { return {memory.data(), {1, 2, capacity}}; }
  scores of_head(index_t head) {
    const float* const data = scores_view().at(0, head);
    return {data, data + toy::tokens - 3};
  }

  /// Selects and drops the other tokens. The layer may have attention rows or none.
  template <class Layer>
  void select(const policy::cake& policy, const Layer& layer) {
    const auto length = static_cast<position_t>(slots[0].size());
    guarded_bytes scratch(refreekv::workspace_size(policy, divided<1>(), layer));
    guarded_positions kept(1, 2, layer.capacity());
    REQUIRE(refreekv::select(policy, divided<1>(), layer, kept.kept(), scratch.middle()) ==
            refreekv::status::ok);
    REQUIRE(scratch.intact());
    REQUIRE(refreekv::compact(divided<1>(), kept.kept(), refreekv::compaction::suffix_down,
                              source(&length)) == refreekv::status::ok);
    slots = at_slots(slots, {positions_of(kept.kept(), 0, 0), positions_of(kept.kept(), 0, 1)});
  }
  refreekv::dense<float> source(const position_t* length) {
    return refreekv::dense<float>(refreekv::view<float, 4>(memory.data(), {1, 2, capacity, 1}),
                                  {length, {1}});
  }
};

/// The state of a model with four layers.
class cake_model {
 public:
  cake_model(index_t q_heads, double tau1, double tau2)
      : q_heads_(q_heads),
        policy_{.budget = 7, .window = 3, .layers = 4, .tau1 = tau1, .tau2 = tau2} {}

  std::vector<cake_layer> layers = std::vector<cake_layer>(4);
  std::vector<double> preferences = std::vector<double>(4, -1.0);

  /// Selects in a layer that has attention rows: it was just prefilled.
  void prefill(index_t l) {
    const row_tensor tensor({toy::attention(q_heads_, l)}, toy::tokens, 1);
    layers[size(l)].select(policy_,
                           refreekv::with_layers(tensor.layer(2, info(l)), state(l, l + 1)));
  }
  /// Selects in a layer that was prefilled earlier: it has no attention rows.
  void shrink(index_t l, index_t finished) {
    cake_layer& layer = layers[size(l)];
    const auto length = static_cast<position_t>(layer.slots[0].size());
    layer.select(policy_, refreekv::with_layers(refreekv::observe(layer.source(&length), info(l)),
                                                state(l, finished)));
  }

 private:
  refreekv::cake_layers<> state(index_t l, index_t finished) {
    return {.scores = layers[size(l)].scores_view(),
            .preferences = {preferences.data(), {1, 4}},
            .finished = static_cast<count_t>(finished),
            .prompts = {&prompt_, {1}}};
  }

  index_t q_heads_;
  policy::cake policy_;
  position_t prompt_ = toy::tokens;
};

check cake(index_t q_heads, double tau1, double tau2) {
  return [=](const json& entry) {
    cake_model model(q_heads, tau1, tau2);
    for (index_t l = 0; l < 4; ++l) {
      INFO("layer " << l);
      model.prefill(l);
      CHECK(model.preferences[size(l)] ==
            Approx(entry["H_V_P"][size(l)][2].get<double>()).epsilon(1e-5));
      if (l == 0) {  // no token has been dropped yet
        check_close({model.layers[0].of_head(0), model.layers[0].of_head(1)},
                    entry["indicator_l0"]);
      }
      for (index_t m = 0; m < l; ++m) model.shrink(m, l + 1);
      for (index_t m = 0; m <= l; ++m) {
        const auto budget = entry["stage_budgets"][size(l)][size(m)].get<std::size_t>();
        const auto& slots = model.layers[size(m)].slots;
        CHECK(slots[0].size() <= budget + 3);
        if (m == l) CHECK(slots[0].size() == budget + 3);
      }
    }
    for (std::size_t l = 0; l < 4; ++l) {
      INFO("layer " << l);
      CHECK(model.layers[l].slots == ascending_heads(entry["kept"][l]));
    }
  };
}

/// Decodes two tokens. Slots are in the order of the published code.
void cake_decode(const json& entry) {
  const policy::cake_decode policy{.budget = entry["hh"], .recent = entry["window"]};
  auto slots = entry["start"].get<kept_heads>();
  position_t next = toy::tokens;
  for (const json& step : entry["steps"]) {
    for (auto& of_head : slots) of_head.push_back(next);
    const row_tensor tensor(
        {toy::row_of_slots(
            slots, [&](index_t h, position_t p) { return toy::decode_weight(h, next, p); })},
        1);
    kept_heads kept = at_slots(slots, kept_by(policy, tensor.layer(2)));
    for (auto& of_head : kept) std::sort(of_head.begin(), of_head.end());
    CHECK(kept == ascending_heads(step["kept"]));
    slots = step["kept"].get<kept_heads>();
    ++next;
  }
}

/// cake_budget limits a budget to the available tokens. The published code does so afterwards.
void cake_adjust(const json& entry) {
  for (const json& line : entry) {
    const scores preferences = line["pref"];
    const auto layers = static_cast<index_t>(preferences.size());
    for (index_t l = 0; l < layers; ++l) {
      CHECK(refreekv::detail::cake_budget(preferences.data(), 1, layers, l, line["total"],
                                          line["avail"]) ==
            std::min(line["out"][size(l)].get<index_t>(), line["avail"].get<index_t>()));
    }
  }
}

template <class Layer>
void check_twilight(const Layer& layer, const json& entry, const std::string& which,
                    bool sink_start = false) {
  const policy::twilight policy{
      .mass = 0.85, .selector_budget = 8, .sink_start = sink_start, .full_layers = 0};
  const kept_heads kept = kept_by(policy, layer);
  for (std::size_t h = 0; h < kept.size(); ++h) {
    INFO(which << " of head " << h);
    CHECK(kept[h] == ascending(entry[h][which]));
  }
}

/// Two heads with separate keys: exact keys, 4-bit keys, and 4-bit keys of selected pages.
void twilight(const json& entry) {
  const problem p = toy::twilight(2);
  const dense_cache<float> keys(p.keys);
  estimates estimated(keys.source(), p.lengths, 4);
  const auto exec = divided<1>();
  REQUIRE(refreekv::quantise(exec, keys.source(), estimated.keys()) == refreekv::status::ok);
  REQUIRE(refreekv::bound_pages(exec, keys.source(), estimated.page_bounds()) ==
          refreekv::status::ok);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t t = 0; t < toy::tokens; ++t) {
      for (index_t d = 0; d < toy::head_dim; ++d) {
        CHECK(estimated.code(0, h, t, d) == entry[size(h)]["codes"][size(t)][size(d)].get<int>());
      }
    }
  }
  const auto in_4_bits = refreekv::observe(p.query_view(), estimated.keys());
  const auto of_pages = refreekv::with_pages(in_4_bits, estimated.page_bounds());
  check_twilight(refreekv::observe(p.query_view(), keys.source()), entry, "exact_sort");
  check_twilight(in_4_bits, entry, "full_sort");
  check_twilight(in_4_bits, entry, "full_kernel_first", true);
  check_twilight(of_pages, entry, "quest_sort");
  check_twilight(of_pages, entry, "quest_kernel_first", true);
}

void twilight_of_group(const json& entry) {
  const problem p = toy::twilight(1);
  const dense_cache<float> keys(p.keys);
  const policy::twilight policy{.mass = 0.85, .full_layers = 0};
  CHECK(kept_by(policy, refreekv::observe(p.query_view(), keys.source())) ==
        kept_heads{ascending(entry["union"])});
}

}  // namespace

TEST_CASE("policies keep what published code keeps", "[golden]") {
  const std::string in_data = "of the toy data, which the oracle's test rebuilds";
  const std::string as_printed = "the formula as printed: losses below the threshold, sinks go";
  check_entries(
      entries(),
      {{"h2o_real_drop", h2o_real_drop},
       {"h2o_kvcf", h2o(refreekv::all_queries)},
       {"h2o_refree", h2o(3)},
       {"attn_fixed_cap7", h2o(1, 7)},
       {"streaming", streaming_entries},
       {"snapkv_avg3", snapkv(pool_kind::average, 3)},
       {"snapkv_avg5", snapkv(pool_kind::average, 5)},
       {"snapkv_max3", snapkv(pool_kind::max, 3)},
       {"snapkv_max1", snapkv(pool_kind::max, 1)},
       {"snapkv_max3_cap9_unambiguous", snapkv(pool_kind::max, 3, 9)},
       {"snapkv_gqa_mean_avg3", grouped_snapkv(7)},
       {"snapkv_kvpress_gqa", grouped_snapkv(token_budget::share(0.5))},
       {"pyramid", pyramid_budgets},
       {"pyramid_toy_kept", pyramid_kept},
       {"cake_mha_t1_1_t2_1", cake(2, 1, 1)},
       {"cake_gqa_t1_1.6_t2_0.4", cake(4, 1.6, 0.4)},
       {"cake_decode_l3", cake_decode},
       {"cake_adjust", cake_adjust},
       {"twilight", twilight},
       {"twilight_gqa_shared_K0_exact_p0.85", twilight_of_group},
       {"top_p_cases", top_p_cases},
       {"refreekv_attn_ranked_T0.01", attention_ranked(0.01, 3)},
       {"refreekv_attn_ranked_T0.05", attention_ranked(0.05, 3)},
       {"refreekv_attn_ranked_T0.2", attention_ranked(0.2, 3)},
       {"refreekv_allrows_T0.05", attention_ranked(0.05, refreekv::all_queries)},
       {"refreekv_position_T0.01", position_ranked(0.01)},
       {"refreekv_position_T0.05", position_ranked(0.05)},
       {"refreekv_position_T0.2", position_ranked(0.2)}},
      {{"seed", in_data},
       {"tw_seed", in_data},
       {"weights_l0", in_data},
       {"last_row", in_data},
       {"snapkv_vote", "scores before pooling, which no policy shows: see the oracle's test"},
       {"h2o_masked_sim", "hides one token more than it evicts, for one step"},
       {"h2o_kvpress_gqa4_2", "divides by the number of queries and protects no recent tokens"},
       {"refreekv_position_paper_T0.01", as_printed},
       {"refreekv_position_paper_T0.05", as_printed},
       {"refreekv_position_paper_T0.2", as_printed}});
}
