// SPDX-License-Identifier: Apache-2.0
#include "pruning_rule.hpp"

namespace smollm2 {

const char* why_invalid(const pruning_rule& rule) {
  return std::visit(
      [](const auto& r) -> const char* {
        if constexpr (std::same_as<decltype(r), const keep_everything&>) {
          return nullptr;
        } else {
          return r.invalid();
        }
      },
      rule);
}

bool keeps_ranges(const pruning_rule& rule) {
  return std::visit(
      []<class Rule>(const Rule&) {
        if constexpr (std::same_as<Rule, keep_everything>) {
          return true;
        } else {
          return std::same_as<refreekv::decision_of<Rule, refreekv::host_memory>,
                              refreekv::kept_ranges<refreekv::host_memory>>;
        }
      },
      rule);
}

std::size_t window_of(const pruning_rule& rule) {
  return std::visit(
      [](const auto& r) -> std::size_t {
        if constexpr (requires { r.window; }) {
          return r.window;
        } else {
          return 1;
        }
      },
      rule);
}

pruning_rule with_rows(pruning_rule rule, std::size_t rows) {
  std::visit(
      [&](auto& each) {
        if constexpr (requires { each.window; }) {
          if (each.window > rows) each.window = static_cast<refreekv::count_t>(rows);
        }
      },
      rule);
  return rule;
}

void set_layers(pruning_rule& rule, std::size_t layers) {
  std::visit(
      [&](auto& r) {
        if constexpr (requires { r.layers; }) r.layers = static_cast<refreekv::count_t>(layers);
      },
      rule);
}

}  // namespace smollm2
