// SPDX-License-Identifier: Apache-2.0
// Whole text files, in and out.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace smollm2 {

// Both throw std::runtime_error with the path where it cannot be done.
std::string read_file(const std::filesystem::path& path);
void write_file(const std::filesystem::path& path, std::string_view text);

}  // namespace smollm2
