// SPDX-License-Identifier: Apache-2.0
// On toy data, the oracle of the methods that rank tokens keeps the same tokens as their published
// code.
#include "golden_policies.hpp"

namespace {

using namespace golden;
using reference::attention_rows;
using reference::pool;

const attention_rows mha = toy::attention(2), gqa = toy::attention(4);

void weights(const json& entry) {
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < toy::tokens; ++i) {
      scores row;
      for (index_t j = 0; j <= i; ++j) row.push_back(toy::weight(0, h, i, j));
      CHECK(row == entry[static_cast<std::size_t>(h)][static_cast<std::size_t>(i)].get<scores>());
    }
  }
}

void last_rows(const json& entry) {
  for (index_t h = 0; h < 2; ++h) {
    check_close(reference::last_row(mha, h), entry[static_cast<std::size_t>(h)]);
  }
}

scores at(const scores& of_head, const std::vector<position_t>& kept) {
  scores out;
  for (const position_t p : kept) out.push_back(of_head[static_cast<std::size_t>(p)]);
  return out;
}

/// Decodes three tokens after the prompt.
void h2o_real_drop(const json& entry) {
  for (index_t h = 0; h < 2; ++h) {
    const json& steps = entry[static_cast<std::size_t>(h)];
    attention_rows rows = toy::attention(2);
    rows.values.erase(rows.values.begin(), rows.values.begin() + h * toy::tokens * toy::tokens);
    rows.values.resize(toy::tokens * toy::tokens);
    rows.q_heads = 1;
    kept_heads slots{{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}};
    std::vector<scores> carried;
    for (const json& step : steps) {
      const auto result = reference::h2o(rows, 1, 6, 3, toy::tokens, carried);
      const kept_heads kept = positions(result.kept);
      CHECK(at_slots(slots, kept) == kept_heads{step["kept"]});
      slots = at_slots(slots, kept);
      carried = {at(result.sums[0], kept[0])};
      check_close(carried[0], step["score"]);
      slots[0].push_back(static_cast<position_t>(slots[0].back() + 1));
      carried[0].push_back(0);
      rows = toy::row_of_slots(
          slots, [&](index_t, position_t p) { return toy::weight(0, h, slots[0].back(), p); });
    }
  }
}

check h2o_of_rows(index_t window, index_t budget = 6) {
  return [=](const json& entry) {
    CHECK(positions(reference::h2o(mha, 2, budget, 3, window).kept) == ascending_heads(entry));
  };
}

check snapkv(pool kind, index_t width, index_t budget = 7) {
  return [=](const json& entry) {
    CHECK(positions(reference::snapkv(mha, 2, budget, 3, kind, width)) ==
          ascending_heads(entry["kept"]));
    if (entry.contains("pooled")) {
      check_close(reference::snapkv_scores(mha, 2, 3, kind, width), entry["pooled"]);
    }
  };
}

check grouped_snapkv(index_t budget) {
  return [=](const json& entry) {
    CHECK(positions(reference::snapkv(gqa, 2, budget, 3, pool::average, 3)) ==
          ascending_heads(entry));
  };
}

check pyramid(index_t tokens, index_t layers, index_t budget, index_t window, index_t beta = 20,
              reference::pyramid_divisor divisor = reference::pyramid_divisor::layers_less_one) {
  return [=](const json& entry) {
    REQUIRE(static_cast<index_t>(entry.size()) == layers);
    for (index_t l = 0; l < layers; ++l) {
      const auto ours = reference::pyramid_budget(tokens, l, layers, budget, window, beta, divisor);
      const json& theirs = entry[static_cast<std::size_t>(l)];
      CHECK(ours.has_value() != theirs.is_null());
      if (ours.has_value()) CHECK(*ours == theirs.get<index_t>());
    }
  };
}

void pyramid_budgets(const json& entry) {
  constexpr auto over_layers = reference::pyramid_divisor::layers;
  check_entries(entry,
                {{"C128_w8_L32_n8000", pyramid(8000, 32, 128, 8)},
                 {"C2048_w8_L32_n7500", pyramid(7500, 32, 2048, 8)},
                 {"C2048_w8_L32_n7500_divL", pyramid(7500, 32, 2048, 8, 20, over_layers)},
                 {"C2048_w8_L32_n4085", pyramid(4085, 32, 2048, 8)},
                 {"C2048_w8_L32_n4079", pyramid(4079, 32, 2048, 8)},
                 {"C2048_w8_L32_n2047", pyramid(2047, 32, 2048, 8)},
                 {"C128_w8_L32_n240_clipped", pyramid(240, 32, 128, 8)},
                 {"toy_n12_L3_C6_w2_beta4", pyramid(12, 3, 6, 2, 4)},
                 {"toy_n12_L3_C6_w2_beta4_divL", pyramid(12, 3, 6, 2, 4, over_layers)},
                 {"toy_n7_L3_C6_w2_beta4", pyramid(7, 3, 6, 2, 4)}},
                {{"kvpress_n4096_L32_r05", "real-valued budgets that include the window"},
                 {"kvpress_n4096_L32_r09", "real-valued budgets that include the window"}});
}

void pyramid_kept(const json& entry) {
  for (index_t l = 0; l < 3; ++l) {
    const index_t budget = *reference::pyramid_budget(toy::tokens, l, 3, 6, 2, 4,
                                                      reference::pyramid_divisor::layers_less_one);
    CHECK(positions(reference::snapkv(toy::attention(2, l), 2, budget + 2, 2, pool::average, 3)) ==
          ascending_heads(entry[static_cast<std::size_t>(l)]));
  }
}

/// Compares four layers, with the budgets after each layer.
check cake(index_t q_heads, double tau1, double tau2) {
  return [=](const json& entry) {
    constexpr index_t window = 3, total = 16, available = 9;
    scores preferences;
    std::vector<reference::cake_layer> layers;
    std::vector<std::vector<scores>> left;  // [layer, kv_head]; dropped tokens have -1
    for (index_t l = 0; l < 4; ++l) {
      layers.push_back(reference::cake_statistics(toy::attention(q_heads, l), 2, window, 200));
      preferences.push_back(reference::cake_preference(layers.back(), tau1, tau2));
      left.push_back(layers.back().indicators);
      check_close(scores{layers.back().entropy, layers.back().variance, preferences.back()},
                  entry["H_V_P"][static_cast<std::size_t>(l)], 1e-8);
      const auto budgets = reference::cake_budgets(preferences, total, available);
      CHECK(budgets ==
            entry["stage_budgets"][static_cast<std::size_t>(l)].get<std::vector<index_t>>());
      for (std::size_t m = 0; m < budgets.size(); ++m) {
        for (scores& of_head : left[m]) {
          const auto kept = reference::top_k(of_head, budgets[m], available);
          for (std::size_t t = 0; t < of_head.size(); ++t) {
            if (!kept.kept[t]) of_head[t] = -1;
          }
        }
      }
    }
    check_close(layers[0].indicators, entry["indicator_l0"]);
    const auto once = reference::cake_budgets(preferences, total, available);
    CHECK(once == entry["oneshot_budgets"].get<std::vector<index_t>>());
    for (std::size_t l = 0; l < 4; ++l) {
      kept_heads cascaded;
      for (const scores& of_head : left[l]) {
        cascaded.emplace_back();
        for (position_t t = 0; t < toy::tokens; ++t) {
          const bool stays = t >= available || of_head[static_cast<std::size_t>(t)] >= 0;
          if (stays) cascaded.back().push_back(t);
        }
      }
      CHECK(cascaded == ascending_heads(entry["kept"][l]));
      const kept_heads at_once =
          positions(reference::top_k(layers[l].indicators, once[l], toy::tokens));
      for (std::size_t h = 0; h < at_once.size(); ++h) {
        CHECK((at_once[h] == cascaded[h]) == entry["oneshot_same"][l][h].get<bool>());
      }
    }
  };
}

/// Decodes two tokens. Slots are in the order of the published code.
void cake_decode(const json& entry) {
  auto slots = entry["start"].get<kept_heads>();
  position_t next = toy::tokens;
  for (const json& step : entry["steps"]) {
    for (auto& of_head : slots) of_head.push_back(next);
    const attention_rows rows = toy::row_of_slots(
        slots, [&](index_t h, position_t p) { return toy::decode_weight(h, next, p); });
    for (index_t h = 0; h < 2; ++h) {
      check_close(reference::last_row(rows, h), step["rows"][static_cast<std::size_t>(h)]);
    }
    kept_heads kept =
        at_slots(slots, positions(reference::cake_decode(rows, 2, entry["hh"], entry["window"])));
    for (auto& of_head : kept) std::sort(of_head.begin(), of_head.end());
    CHECK(kept == ascending_heads(step["kept"]));
    slots = step["kept"].get<kept_heads>();
    ++next;
  }
}

void cake_adjust(const json& entry) {
  for (const json& line : entry) {
    const index_t total = line["total"];
    CHECK(reference::cake_adjust(reference::cake_shares(line["pref"], total), total,
                                 line["avail"]) == line["out"].get<std::vector<index_t>>());
  }
}

void check_sets(const scores& probabilities, double p, const json& entry,
                const std::string& which) {
  using reference::top_p, reference::top_p_kernel;
  INFO(which);
  CHECK(top_p(probabilities, p).positions() == ascending(entry[which + "_sort"]));
  if (!entry.contains(which + "_kernel_first")) return;
  CHECK(top_p_kernel(probabilities, p).positions() == ascending(entry[which + "_kernel_first"]));
  CHECK(top_p_kernel(probabilities, p, true).positions() ==
        ascending(entry[which + "_kernel_max"]));
}

void twilight(const json& entry) {
  for (index_t h = 0; h < 2; ++h) {
    const json& head = entry[static_cast<std::size_t>(h)];
    const scores query = toy::query(h);
    const std::vector<scores> keys = toy::keys(h);
    CHECK(query == head["q"].get<scores>());
    CHECK(keys == head["K"].get<std::vector<scores>>());
    std::vector<scores> estimated;
    for (std::size_t t = 0; t < keys.size(); ++t) {
      const auto quantised = reference::quantise(keys[t], 4);
      CHECK(quantised.codes == head["codes"][t].get<std::vector<int>>());
      estimated.push_back(quantised.values);
    }
    const auto pages = reference::quest(query, keys, 4, 8);
    CHECK(pages.bounds == head["quest_page_scores"].get<scores>());
    CHECK(pages.pages == head["quest_pages"].get<std::vector<index_t>>());
    const scores logits = reference::logits(query, estimated, 0.5);
    const scores exact = reference::softmax(reference::logits(query, keys, 0.5));
    const scores full = reference::softmax(logits);
    const scores masked = reference::masked_softmax(logits, pages.tokens);
    check_close(exact, head["exact"]);
    check_close(full, head["est_full"]);
    check_close(masked, head["est_masked"]);
    check_sets(exact, 0.85, head, "exact");
    check_sets(full, 0.85, head, "full");
    check_sets(masked, 0.85, head, "quest");
  }
}

void twilight_of_group(const json& entry) {
  std::vector<reference::choice> heads;
  for (index_t h = 0; h < 2; ++h) {
    const scores logits = reference::logits(toy::query(h), toy::keys(0), 0.5);
    heads.push_back(reference::top_p(reference::softmax(logits), 0.85));
  }
  CHECK(positions(heads) == ascending_heads(entry["per_query_head"]));
  CHECK(reference::unite(heads).positions() == ascending(entry["union"]));
}

void top_p_cases(const json& entry) {
  for (const json& line : entry) {
    INFO(line["name"]);
    const scores probabilities = line["probs"];
    const double p = line["p"];
    CHECK(reference::top_p(probabilities, p).positions() == ascending(line["sort"]));
    CHECK(reference::top_p_kernel(probabilities, p).positions() ==
          ascending(line["kernel_official"]));
    CHECK(reference::top_p_kernel(probabilities, p, true).positions() ==
          ascending(line["kernel_max"]));
  }
}

check attention_ranked(double threshold, index_t window) {
  return [=](const json& entry) {
    const auto result = reference::attention_ranked(mha, 2, threshold, window, 3);
    CHECK(result.orders == entry["order_least_first"].get<std::vector<std::vector<index_t>>>());
    CHECK(result.index == entry["idx"].get<index_t>());
    check_close(result.losses, entry["ratios"]);
    CHECK(positions({result.of(0), result.of(1)}) == ascending_heads(entry["kept"]));
  };
}

/// Compares ReFreeKV's stop rule on tokens ranked by position.
check position_ranked(double threshold) {
  return [=](const json& entry) {
    refreekv::policy::refreekv policy;
    policy.threshold = threshold;
    const auto result = reference::decide(mha, 0, 2, policy);
    CHECK(result.cut == 4 + entry["idx"].get<index_t>());
    check_close(scores(result.losses.begin() + 4, result.losses.end()), entry["ratios"]);
  };
}

check number(std::uint32_t expected) {
  return [=](const json& entry) { CHECK(entry.get<std::uint32_t>() == expected); };
}

}  // namespace

TEST_CASE("the oracle keeps what published code keeps", "[golden]") {
  check_entries(
      entries(),
      {{"seed", number(toy::seed)},
       {"tw_seed", number(toy::twilight_seed)},
       {"weights_l0", weights},
       {"last_row", last_rows},
       {"h2o_real_drop", h2o_real_drop},
       {"h2o_kvcf", h2o_of_rows(toy::tokens)},
       {"h2o_refree", h2o_of_rows(3)},
       {"attn_fixed_cap7", h2o_of_rows(1, 7)},
       {"snapkv_avg3", snapkv(pool::average, 3)},
       {"snapkv_avg5", snapkv(pool::average, 5)},
       {"snapkv_max3", snapkv(pool::max, 3)},
       {"snapkv_max1", snapkv(pool::max, 1)},
       {"snapkv_max3_cap9_unambiguous", snapkv(pool::max, 3, 9)},
       {"snapkv_vote",
        [](const json& entry) { check_close(reference::votes(mha, 2, 3, 9), entry); }},
       {"snapkv_gqa_mean_avg3", grouped_snapkv(7)},
       {"snapkv_kvpress_gqa", grouped_snapkv(6)},
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
       {"refreekv_allrows_T0.05", attention_ranked(0.05, toy::tokens)},
       {"refreekv_position_T0.01", position_ranked(0.01)},
       {"refreekv_position_T0.05", position_ranked(0.05)},
       {"refreekv_position_T0.2", position_ranked(0.2)}},
      {{"h2o_masked_sim", "hides one token more than it evicts, for one step"},
       {"h2o_kvpress_gqa4_2", "divides by the number of queries and protects no recent tokens"},
       {"streaming", "needs no oracle: sinks and recent tokens"},
       {"refreekv_position_paper_T0.01",
        "the formula as printed drops what is below the threshold"},
       {"refreekv_position_paper_T0.05",
        "the formula as printed drops what is below the threshold"},
       {"refreekv_position_paper_T0.2",
        "the formula as printed drops recent tokens before sinks"}});
}
