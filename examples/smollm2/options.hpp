// SPDX-License-Identifier: Apache-2.0
// The command line.
#pragma once

#include <filesystem>
#include <optional>

#include "run_options.hpp"

namespace smollm2 {

struct options : run_settings {
  std::filesystem::path plot;             // without ending; empty for none
  std::optional<std::size_t> plot_layer;  // the middle one if not given
};

// Nothing where only help was asked for. Throws usage_error for options that cannot be, and
// std::runtime_error for files that cannot be read.
std::optional<options> parse_options(int argc, char** argv);

}  // namespace smollm2
