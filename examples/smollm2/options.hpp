// SPDX-License-Identifier: Apache-2.0
// The command line.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "run_options.hpp"

namespace smollm2 {

struct options : run_settings {
  std::vector<std::string> replies;            // further messages, each after an answer
  std::vector<refreekv::token_range> protect;  // positions in the conversation
  std::size_t prune_every = 0;                 // tokens of an answer; 0: after prompts only
  std::filesystem::path plot;                  // without ending; empty for none
  std::optional<std::size_t> plot_layer;       // the middle one if not given
};

// Nothing where only help was asked for. Throws usage_error for options that cannot be, and
// std::runtime_error for files that cannot be read.
std::optional<options> parse_options(int argc, char** argv);

}  // namespace smollm2
