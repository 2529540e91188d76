// SPDX-License-Identifier: Apache-2.0
#include "pruning_policy.hpp"

namespace smollm2 {

const char* why_invalid(const pruning_policy& policy) {
  return std::visit(
      [](const auto& alternative) -> const char* {
        if constexpr (std::same_as<decltype(alternative), const keep_everything&>) {
          return nullptr;
        } else {
          return refreekv::why_invalid(alternative);
        }
      },
      policy);
}

bool keeps_ranges(const pruning_policy& policy) {
  return std::visit(
      []<class Policy>(const Policy&) {
        return range_policy<Policy> || std::same_as<Policy, keep_everything>;
      },
      policy);
}

std::size_t window_of(const pruning_policy& policy) {
  return std::visit(
      [](const auto& alternative) -> std::size_t {
        if constexpr (requires { alternative.window; }) {
          return alternative.window;
        } else {
          return 1;
        }
      },
      policy);
}

void set_layers(pruning_policy& policy, std::size_t layers) {
  std::visit(
      [&](auto& alternative) {
        if constexpr (requires { alternative.layers; }) {
          alternative.layers = static_cast<refreekv::count_t>(layers);
        }
      },
      policy);
}

}  // namespace smollm2
