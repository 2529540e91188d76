// SPDX-License-Identifier: Apache-2.0
// The command line.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "catalogue.hpp"

namespace evaluate {

struct named_budget {
  std::string name;
  double share;              // of the prompt
  const variant* reference;  // not null: as much as it keeps of the same prompt
};

struct options {
  std::filesystem::path model;
  std::vector<std::filesystem::path> prompts;
  std::size_t limit;
  std::size_t pass_keys = 0;  // prompts with a key to find
  std::uint64_t seed = 1;     // of those
  bool question_later = false;
  std::vector<std::string> methods;
  std::vector<named_budget> budgets;
  std::size_t tokens = 24;      // to compare
  std::size_t prune_every = 0;  // tokens of an answer; 0: after the prompt only
  std::size_t full_layers = 0;  // first layers that no method prunes
  int threads = 1;
  std::optional<std::size_t> max_tokens;  // of a prompt; what the model's context allows
  bool raw = false;
  std::filesystem::path csv;  // empty for none, as the next two
  std::filesystem::path json;
  std::filesystem::path plot;  // without ending
};

// Nothing where only help was asked for. Throws smollm2::usage_error for options that cannot be.
std::optional<options> parse_options(int argc, char** argv);

}  // namespace evaluate
