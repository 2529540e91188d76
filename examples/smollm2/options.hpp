// SPDX-License-Identifier: Apache-2.0
// The command line.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "pruning.hpp"

namespace smollm2 {

struct options {
  std::filesystem::path model;
  std::string prompt;  // the text itself, question included
  pruning_rule rule;
  std::size_t tokens = 64;  // to generate
  int threads = 1;
  bool compare = false;
  std::filesystem::path json;             // empty for none
  std::filesystem::path plot;             // without ending; empty for none
  std::optional<std::size_t> plot_layer;  // the middle one if not given
};

// Nothing where only help was asked for. Throws usage_error for options that cannot be, and
// std::runtime_error for files that cannot be read.
std::optional<options> parse_options(int argc, char** argv);

}  // namespace smollm2
