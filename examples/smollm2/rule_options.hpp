// SPDX-License-Identifier: Apache-2.0
// The options on the command line that choose a rule.
#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>

#include "pruning_rule.hpp"

namespace smollm2 {

class rule_options {
 public:
  // Must outlive the app's parsing.
  void add_to(CLI::App& app);

  // Throws usage_error where they make no sense.
  pruning_rule rule() const;

 private:
  std::string policy_ = "refreekv";
  // What is not given is what the policy says.
  std::optional<double> threshold_, tolerance_, head_floor_, p_;
  std::optional<bool> stand_ins_, error_term_;
  std::optional<refreekv::count_t> sinks_, window_, full_layers_, room_, pool_width_;
  std::optional<std::string> budget_;
  std::optional<refreekv::row_average> average_;
  std::optional<refreekv::norm_scope> norm_;
  std::optional<refreekv::cut_scope> scope_;
  std::optional<refreekv::pool_kind> pool_;
};

}  // namespace smollm2
