// SPDX-License-Identifier: Apache-2.0
// The command line.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "page_pruning.hpp"

namespace paged {

struct options {
  std::filesystem::path model;
  std::string a, b, c;  // prompts; b and c are empty with `speed`
  page_policy policy;
  std::size_t page_tokens = 16;
  std::size_t tokens = 24;
  int threads = 1;
  bool speed = false;  // of A alone, without the others
};

// Nothing where only help was asked for. Throws usage_error for options that cannot be, and
// std::runtime_error for files that cannot be read.
std::optional<options> parse_options(int argc, char** argv);

}  // namespace paged
