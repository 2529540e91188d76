// SPDX-License-Identifier: Apache-2.0
// The command line: what all programs share, and how llama.cpp is to keep its cache.
#pragma once

#include <optional>

#include "context.hpp"
#include "run_options.hpp"

namespace llama_cpp {

struct program_options : smollm2::run_settings {
  context_options context;
};

// Nothing where only help was asked for. Throws usage_error for options that cannot be, and
// std::runtime_error for files that cannot be read.
std::optional<program_options> parse_options(int argc, char** argv);

}  // namespace llama_cpp
