// SPDX-License-Identifier: Apache-2.0
#include "rule_options.hpp"

#include "budget_option.hpp"
#include "command_line.hpp"

namespace smollm2 {

namespace kv = refreekv;
namespace policy = refreekv::policy;

namespace {

using named_rules = std::vector<std::pair<std::string, pruning_rule>>;

const named_rules& policies() {
  static const named_rules all{{"refreekv", policy::refreekv{}},
                               {"faithful", policy::faithful{}},
                               {"streaming_llm", policy::streaming_llm{}},
                               {"h2o", policy::h2o{}},
                               {"snapkv", policy::snapkv{}},
                               {"pyramidkv", policy::pyramidkv{}},
                               {"tova", policy::tova{}},
                               {"attention_ranked", policy::attention_ranked{}},
                               {"twilight", policy::twilight{}},
                               {"none", keep_everything{}}};
  return all;
}

template <class T, class Option>
void replace(T& value, const std::optional<Option>& option) {
  if (option) value = *option;
}

}  // namespace

void rule_options::add_to(CLI::App& app) {
  std::vector<std::string> names;
  for (const auto& [name, rule] : policies()) names.push_back(name);
  app.add_option("--policy", policy_, "its options are its own where they are not given")
      ->check(CLI::IsMember(names));

  const auto add = [&](const char* option, auto& target, const char* what, const char* who) {
    app.add_option(option, target, what)->group(who);
  };
  const auto add_choice = [&](const char* option, auto& target, const char* who, auto values) {
    app.add_option(option, target)->transform(CLI::CheckedTransformer(values))->group(who);
  };
  using averages = std::vector<std::pair<std::string, kv::row_average>>;
  using norms = std::vector<std::pair<std::string, kv::norm_scope>>;
  using scopes = std::vector<std::pair<std::string, kv::cut_scope>>;
  using pools = std::vector<std::pair<std::string, kv::pool_kind>>;
  add_choice("--average", average_, "refreekv",
             averages{{"mean", kv::row_average::mean}, {"frobenius", kv::row_average::frobenius}});
  add_choice(
      "--norm", norm_, "refreekv",
      norms{{"candidates", kv::norm_scope::candidates}, {"full_row", kv::norm_scope::full_row}});
  add_choice("--scope", scope_, "refreekv, faithful",
             scopes{{"layer", kv::cut_scope::layer}, {"kv_head", kv::cut_scope::kv_head}});
  add("--threshold", threshold_, "share of the norm that may go, in [0, 1]",
      "refreekv, attention_ranked");
  add("--tolerance", tolerance_, "of the outputs' error and the lost scores, in [0, 1]",
      "faithful");
  add("--stand-ins", stand_ins_, "0: none; 1: rows in place of what goes", "faithful");
  add("--error-term", error_term_, "0: the lost scores alone decide", "faithful");
  add("--sinks", sinks_, "first tokens that always stay", "refreekv, faithful, streaming_llm");
  add("--full-layers", full_layers_, "first layers that are not pruned",
      "refreekv, attention_ranked, twilight");
  add("--budget", budget_, "tokens that stay, or their share of the prompt: 0.5, 50%",
      "streaming_llm, h2o, snapkv, pyramidkv, tova");
  add("--room", room_, "tokens about to come that must fit", "streaming_llm");
  add("--window", window_, "last queries that are looked at",
      "all but streaming_llm, tova and twilight");
  add_choice("--pool", pool_, "snapkv, pyramidkv",
             pools{{"average", kv::pool_kind::average}, {"max", kv::pool_kind::max}});
  add("--pool-width", pool_width_, "neighbours that a score takes in", "snapkv, pyramidkv");
  add("--head-floor", head_floor_, "share of the budget that is each KV head's own, in [0, 1]",
      "snapkv");
  add("--p", p_, "share of the attention that stays", "twilight");
}

pruning_rule rule_options::rule() const {
  const auto is_chosen = [&](const auto& each) { return each.first == policy_; };
  pruning_rule chosen = std::find_if(policies().begin(), policies().end(), is_chosen)->second;
  std::visit(
      [&](auto& rule) {
        if constexpr (requires { rule.threshold; }) replace(rule.threshold, threshold_);
        if constexpr (requires { rule.tolerance; }) replace(rule.tolerance, tolerance_);
        if constexpr (requires { rule.stand_ins; }) replace(rule.stand_ins, stand_ins_);
        if constexpr (requires { rule.error_term; }) replace(rule.error_term, error_term_);
        if constexpr (requires { rule.head_floor; }) replace(rule.head_floor, head_floor_);
        if constexpr (requires { rule.mass; }) replace(rule.mass, p_);
        if constexpr (requires { rule.sinks; }) replace(rule.sinks, sinks_);
        if constexpr (requires { rule.window; }) replace(rule.window, window_);
        if constexpr (requires { rule.full_layers; }) replace(rule.full_layers, full_layers_);
        if constexpr (requires { rule.incoming; }) replace(rule.incoming, room_);
        if constexpr (requires { rule.average; }) replace(rule.average, average_);
        if constexpr (requires { rule.norm; }) replace(rule.norm, norm_);
        if constexpr (requires { rule.scope; }) replace(rule.scope, scope_);
        if constexpr (requires { rule.pool; }) {
          replace(rule.pool.kind, pool_);
          replace(rule.pool.width, pool_width_);
        }
        if constexpr (requires { rule.budget; }) {
          if (budget_) rule.budget = parse_budget(*budget_);
        }
      },
      chosen);
  if (const char* why = why_invalid(chosen)) throw usage_error(why);
  return chosen;
}

}  // namespace smollm2
