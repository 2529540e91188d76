// SPDX-License-Identifier: Apache-2.0
// A picture of the results: divergence against what is kept, one line for each method.
#pragma once

#include <filesystem>

#include "results.hpp"

namespace evaluate {

// Draws base.svg and base.png with gnuplot. Throws std::runtime_error where it cannot.
void draw(const results& all, const std::filesystem::path& base);

}  // namespace evaluate
