// SPDX-License-Identifier: Apache-2.0
#include "catalogue.hpp"

#include <algorithm>
#include <cmath>

namespace evaluate {

namespace {

namespace kv = refreekv;
namespace policy = refreekv::policy;

kv::token_budget share_of(const circumstances& c) { return kv::token_budget::share(c.share); }

std::vector<variant> of_methods_with_budgets() {
  constexpr kv::pooling max_of_7{kv::pool_kind::max, 7};
  return {
      {"streaming_llm", "", true,
       [](const circumstances& c) { return policy::streaming_llm{.budget = share_of(c)}; },
       "streaming_llm"},
      {"h2o", "all rows", true,
       [](const circumstances& c) { return policy::h2o{.budget = share_of(c)}; }, "h2o, all rows"},
      {"h2o", "last 8 rows", true,
       [](const circumstances& c) {
         return policy::h2o{.budget = share_of(c), .recent = 8, .window = 8};
       },
       "h2o, last 8 rows"},
      {"snapkv", "window 32, max pool 7", true,
       [=](const circumstances& c) {
         return policy::snapkv{.budget = share_of(c), .window = 32, .pool = max_of_7};
       },
       "snapkv"},
      {"ada_snapkv", "window 32, max pool 7, head floor 0.2", true,
       [=](const circumstances& c) {
         return policy::snapkv{
             .budget = share_of(c), .window = 32, .pool = max_of_7, .head_floor = 0.2};
       },
       "ada_snapkv"},
      {"pyramidkv", "window 8, max pool 7", true,
       [=](const circumstances& c) {
         return policy::pyramidkv{.budget = share_of(c), .window = 8, .pool = max_of_7};
       },
       "pyramidkv"},
      {"cake", "window 32, cascade", true,
       [](const circumstances& c) { return policy::cake{.budget = share_of(c), .window = 32}; },
       "cake"},
      {"tova", "", true, [](const circumstances& c) { return policy::tova{.budget = share_of(c)}; },
       "tova"},
  };
}

// Those that decide how much stays, but for ReFreeKV.
std::vector<variant> of_adaptive_methods() {
  std::vector<variant> variants;
  for (const auto& [name, p] : {std::pair{"p 0.95", 0.95}, {"p 0.85", 0.85}}) {
    variants.push_back({"twilight", std::string(name) + ", once after the prefill", false,
                        [p = p](const circumstances&) { return policy::twilight{.mass = p}; },
                        "twilight"});
  }
  for (const auto& [rows, window] :
       {std::pair{"window 8", kv::count_t{8}}, {"all rows", kv::all_queries}}) {
    for (const auto& [name, threshold] : {std::pair{"1 %", 0.01}, {"0.01 %", 0.0001}}) {
      variants.push_back({"attention_ranked", std::string(rows) + ", threshold " + name, false,
                          [window = window, threshold = threshold](const circumstances&) {
                            return policy::attention_ranked{.threshold = threshold,
                                                            .window = window};
                          },
                          std::string("attention_ranked, ") + rows});
    }
  }
  return variants;
}

std::vector<variant> of_faithful() {
  std::vector<variant> variants;
  const auto add = [&](const std::string& options, const policy::faithful& policy,
                       const std::string& line) {
    variants.push_back(
        {"faithful", options, false, [policy](const circumstances&) { return policy; }, line});
  };
  add("the default: tolerance 0.1", {}, "faithful");
  for (const auto& [name, tolerance] :
       {std::pair{"0.03", 0.03}, {"0.06", 0.06}, {"0.16", 0.16}, {"0.24", 0.24}}) {
    add(std::string("tolerance ") + name, {.tolerance = tolerance}, "faithful");
  }
  add("tolerance 0.2 of the lost scores alone", {.tolerance = 0.2, .error_term = false},
      "faithful, no error term");
  add("tolerance 0.16, no stand-ins", {.tolerance = 0.16, .stand_ins = false},
      "faithful, no stand-ins");
  for (const auto& [name, tolerance] : {std::pair{"0.1", 0.1}, {"0.16", 0.16}}) {
    add(std::string("KV heads of one length, tolerance ") + name,
        {.tolerance = tolerance, .scope = kv::cut_scope::layer}, "faithful, one length");
  }
  return variants;
}

// ReFreeKV with one set of options at a fixed threshold.
variant refreekv_variant(const std::string& options, const policy::refreekv& policy,
                         const std::string& line) {
  return {"refreekv", options, false, [policy](const circumstances&) { return policy; }, line};
}

// One option at a time, then a window of 16 rows with each of the others.
std::vector<variant> of_refreekv() {
  constexpr auto frobenius = kv::row_average::frobenius;
  constexpr auto kv_head = kv::cut_scope::kv_head;
  constexpr auto full_row = kv::norm_scope::full_row;
  const std::string thresholds = "refreekv", windowed = "refreekv, window 16 frobenius",
                    others = "refreekv, other options";

  std::vector<variant> variants{
      refreekv_variant("threshold 0.1 %", {.threshold = 0.001}, thresholds),
      refreekv_variant("the default: 1 %, last row", {}, thresholds),
      refreekv_variant("threshold 5 %", {.threshold = 0.05}, thresholds),
      refreekv_variant("threshold 10 %", {.threshold = 0.1}, thresholds),
      refreekv_variant("norm full_row", {.norm = full_row}, others),
      refreekv_variant("scope kv_head", {.scope = kv_head}, others),
      refreekv_variant("window 8", {.window = 8}, others),
      refreekv_variant("window 8 frobenius", {.window = 8, .average = frobenius}, others),
      refreekv_variant("window 16", {.window = 16}, others),
      refreekv_variant("window 16 frobenius", {.window = 16, .average = frobenius}, windowed)};
  for (const auto& [name, average] : {std::pair{"window 1 % of n", kv::row_average::mean},
                                      {"window 1 % of n frobenius", frobenius}}) {
    variants.push_back({"refreekv", name, false,
                        [average = average](const circumstances& c) {
                          const double rows = std::round(0.01 * static_cast<double>(c.tokens));
                          return policy::refreekv{
                              .window = static_cast<kv::count_t>(std::max(1.0, rows)),
                              .average = average};
                        },
                        others});
  }
  const std::vector<variant> combinations{
      refreekv_variant("window 16 frobenius, threshold 0.1 %",
                       {.threshold = 0.001, .window = 16, .average = frobenius}, windowed),
      refreekv_variant("window 16 frobenius, threshold 5 %",
                       {.threshold = 0.05, .window = 16, .average = frobenius}, windowed),
      refreekv_variant("window 16 frobenius, threshold 10 %",
                       {.threshold = 0.1, .window = 16, .average = frobenius}, windowed),
      refreekv_variant("window 16 frobenius, norm full_row",
                       {.window = 16, .average = frobenius, .norm = full_row}, others),
      refreekv_variant("window 16 frobenius, scope kv_head",
                       {.window = 16, .average = frobenius, .scope = kv_head}, others)};
  variants.insert(variants.end(), combinations.begin(), combinations.end());
  return variants;
}

}  // namespace

const std::vector<variant>& all_variants() {
  static const std::vector<variant> variants = [] {
    std::vector<variant> all{
        {"none", "", false, [](const circumstances&) { return smollm2::keep_everything{}; }, ""}};
    for (const auto& group :
         {of_methods_with_budgets(), of_faithful(), of_adaptive_methods(), of_refreekv()}) {
      all.insert(all.end(), group.begin(), group.end());
    }
    return all;
  }();
  return variants;
}

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const variant& each : all_variants()) {
    if (std::find(names.begin(), names.end(), each.method) == names.end()) {
      names.push_back(each.method);
    }
  }
  return names;
}

const variant* find_adaptive(const std::string& name) {
  for (const variant& each : all_variants()) {
    if (each.has_budget) continue;
    const bool is_default = each.options.empty() || each.options.starts_with("the default");
    if (name == each.method + ", " + each.options || (name == each.method && is_default)) {
      return &each;
    }
  }
  return nullptr;
}

}  // namespace evaluate
