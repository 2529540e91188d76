// SPDX-License-Identifier: Apache-2.0
// Texts to evaluate on that are in files.
#pragma once

#include <filesystem>
#include <vector>

#include "prompts.hpp"

namespace evaluate {

// Files, and the *.txt files of folders in alphabetical order, each named as the file is without
// its ending. At most `limit` of all, evenly spread. Throws std::runtime_error where a file cannot
// be read or a folder has none.
std::vector<prompt_text> read_prompts(const std::vector<std::filesystem::path>& paths,
                                      std::size_t limit);

}  // namespace evaluate
