// SPDX-License-Identifier: Apache-2.0
#include "pruning_rule.hpp"

namespace smollm2 {

const char* why_invalid(const pruning_rule& rule) {
  return std::visit(
      [](const auto& r) -> const char* {
        if constexpr (std::same_as<decltype(r), const keep_everything&>) {
          return nullptr;
        } else {
          return refreekv::why_invalid(r);
        }
      },
      rule);
}

bool keeps_ranges(const pruning_rule& rule) {
  return std::visit(
      []<class Rule>(const Rule&) {
        return range_rule<Rule> || std::same_as<Rule, keep_everything>;
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

void set_layers(pruning_rule& rule, std::size_t layers) {
  std::visit(
      [&](auto& r) {
        if constexpr (requires { r.layers; }) r.layers = static_cast<refreekv::count_t>(layers);
      },
      rule);
}

}  // namespace smollm2
