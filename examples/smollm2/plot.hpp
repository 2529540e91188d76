// SPDX-License-Identifier: Apache-2.0
// A picture of a run: what each layer keeps, and where one layer's loss crosses the threshold.
#pragma once

#include <filesystem>
#include <vector>

#include "pruning.hpp"
#include "report.hpp"

namespace smollm2 {

struct loss_picture {
  std::size_t layer;
  double threshold;
  std::vector<curve_point> curve;
};

// Draws base.svg and base.png with gnuplot. Throws std::runtime_error where it cannot.
void draw(const report& run, const loss_picture& loss, const std::filesystem::path& base);

}  // namespace smollm2
