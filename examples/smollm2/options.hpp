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

// Prints help, or one line about what is wrong, and returns nothing: then the program ends with
// `exit_code` (0 after help, 1 for files that cannot be read, 2 for options that cannot be).
std::optional<options> parse_options(int argc, char** argv, int& exit_code);

}  // namespace smollm2
