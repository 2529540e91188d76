// SPDX-License-Identifier: Apache-2.0
// The texts to evaluate on.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace evaluate {

struct prompt_text {
  std::string name;  // the file's, without its ending
  std::string text;
};

// Files, and the *.txt files of folders in alphabetical order. At most `limit` of all, evenly
// spread. Throws std::runtime_error where a file cannot be read or there is none.
std::vector<prompt_text> read_prompts(const std::vector<std::filesystem::path>& paths,
                                      std::size_t limit);

}  // namespace evaluate
