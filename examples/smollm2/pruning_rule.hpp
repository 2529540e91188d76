// SPDX-License-Identifier: Apache-2.0
// The rule of a run: one of the library's policies, or none.
#pragma once

#include <concepts>
#include <cstddef>
#include <refreekv/refreekv.hpp>
#include <tuple>
#include <variant>

namespace smollm2 {

struct keep_everything {};

template <class Policies>
struct rule_of;
template <class... Policies>
struct rule_of<std::tuple<Policies...>> {
  using type = std::variant<Policies..., keep_everything>;
};
using pruning_rule = rule_of<refreekv::all_policies>::type;

// A policy whose decision is a prefix and a suffix of each layer.
template <class Rule>
concept range_rule = requires { typename Rule::template decision<refreekv::host_memory>; } &&
                     std::same_as<refreekv::decision_of<Rule, refreekv::host_memory>,
                                  refreekv::kept_ranges<refreekv::host_memory>>;

// A policy that looks at values, too, and may leave stand-ins for what goes.
template <class Rule>
concept valued_rule = std::same_as<Rule, refreekv::policy::faithful>;

// Null, or what is wrong with the rule's options.
const char* why_invalid(const pruning_rule& rule);

// Whether the rule is a range_rule, or keeps everything.
bool keeps_ranges(const pruning_rule& rule);

// How many of the last queries the rule looks at; where it is more than there are, all.
std::size_t window_of(const pruning_rule& rule);

// Tells a rule that spreads a budget over the layers how many there are.
void set_layers(pruning_rule& rule, std::size_t layers);

}  // namespace smollm2
