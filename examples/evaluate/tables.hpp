// SPDX-License-Identifier: Apache-2.0
// The results as a table for people, and as CSV and JSON for programs.
#pragma once

#include <filesystem>
#include <ostream>

#include "results.hpp"

namespace evaluate {

void print(const results& all, std::ostream& out);

// Means first, then every prompt. Both throw std::runtime_error where the file cannot be written.
void write_csv(const results& all, const std::filesystem::path& path);
void write_json(const results& all, const std::filesystem::path& path);

}  // namespace evaluate
