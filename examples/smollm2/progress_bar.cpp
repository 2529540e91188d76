// SPDX-License-Identifier: Apache-2.0
#include "progress_bar.hpp"

#include <unistd.h>

#include <cstdio>

namespace smollm2 {

progress_bar::progress_bar() : visible_(isatty(STDERR_FILENO) != 0) {}

progress_bar::~progress_bar() {
  if (shown_) std::fputc('\n', stderr);
}

void progress_bar::show(const std::string& label, double fraction) {
  if (!visible_) return;
  shown_ = true;
  constexpr int width = 40;
  const int done = static_cast<int>(fraction * width);
  // "\033[K" clears what a longer line left.
  std::fprintf(stderr, "\r%s [%.*s%*s] %3d %%\033[K", label.c_str(), done,
               "########################################", width - done, "",
               static_cast<int>(100 * fraction));
}

}  // namespace smollm2
