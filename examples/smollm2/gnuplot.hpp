// SPDX-License-Identifier: Apache-2.0
// Lets gnuplot draw one picture as SVG and PNG.
#pragma once

#include <filesystem>
#include <string>

namespace smollm2 {

struct picture_size {
  int width, height;  // pixels
};

// gnuplot doubles a quote inside quotes.
std::string quoted(const std::string& text);

// Draws base.svg and base.png from gnuplot commands for any terminal. Throws std::runtime_error
// where gnuplot is missing or refuses.
void draw_with_gnuplot(const std::string& commands, picture_size size,
                       const std::filesystem::path& base);

}  // namespace smollm2
