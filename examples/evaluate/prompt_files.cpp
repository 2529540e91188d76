// SPDX-License-Identifier: Apache-2.0
#include "prompt_files.hpp"

#include <algorithm>
#include <stdexcept>

#include "files.hpp"

namespace evaluate {

namespace fs = std::filesystem;

std::vector<prompt_text> read_prompts(const std::vector<fs::path>& paths, std::size_t limit) {
  std::vector<fs::path> files;
  for (const fs::path& path : paths) {
    if (!fs::is_directory(path)) {
      files.push_back(path);
      continue;
    }
    std::vector<fs::path> inside;
    for (const fs::directory_entry& entry : fs::directory_iterator(path)) {
      if (entry.path().extension() == ".txt") inside.push_back(entry.path());
    }
    if (inside.empty()) throw std::runtime_error("no *.txt files in " + path.string());
    std::sort(inside.begin(), inside.end());
    files.insert(files.end(), inside.begin(), inside.end());
  }

  const std::size_t count = std::min(limit, files.size());
  std::vector<prompt_text> prompts;
  for (std::size_t i = 0; i < count; ++i) {
    const fs::path& file = files[i * files.size() / count];
    prompts.push_back({file.stem().string(), smollm2::read_file(file), "", ""});
  }
  return prompts;
}

}  // namespace evaluate
