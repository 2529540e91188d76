// SPDX-License-Identifier: Apache-2.0
// The options on the command line that choose a policy and set its options.
#pragma once

#include <CLI/CLI.hpp>
#include <map>
#include <optional>
#include <string>

#include "pruning_policy.hpp"

namespace smollm2 {

class policy_options {
 public:
  // Adds --policy, and an option for each option of any policy. Must outlive the app's parsing.
  void add_to(CLI::App& app);

  // Throws usage_error where a value makes no sense, or is for another policy.
  pruning_policy chosen() const;

 private:
  std::string name_ = "refreekv";
  std::map<std::string, std::optional<std::string>> texts_;  // by option, as it was typed
};

}  // namespace smollm2
