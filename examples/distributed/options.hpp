// SPDX-License-Identifier: Apache-2.0
// What the programs are told.
#pragma once

#include <optional>
#include <refreekv/backend/norm_scan.hpp>
#include <vector>

#include "deployment.hpp"

namespace distributed {

struct options {
  geometry shape = geometries[0];
  index_t tokens = 4096;
  index_t layers = 3;
  index_t window = 1;
  refreekv::row_average average = refreekv::row_average::mean;
  std::vector<layout> layouts = {layout::heads, layout::tokens, layout::zigzag, layout::grid};
  index_t fewest = 0;  // ranks to begin with; 0 for all of them
  bool timed = false;
};

const char* name_of(layout kind);

// ranks: all there are. Nothing where the program is to end with that exit code: help was asked
// for, or an option cannot be, and `talks` says whether this rank prints it.
std::optional<options> parse(int argc, char** argv, index_t ranks, bool talks, int& exit_code);

}  // namespace distributed
