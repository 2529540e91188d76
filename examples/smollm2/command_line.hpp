// SPDX-License-Identifier: Apache-2.0
// How the programs read their options and end: help, or one line about what is wrong.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <stdexcept>

namespace smollm2 {

// Options that cannot be: the program ends with exit code 2.
class usage_error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// False where help was asked for, and has been printed. Throws usage_error.
bool parse(CLI::App& app, int argc, char** argv);

// What main returns: 0 where `body` returns, 2 where it throws usage_error, 1 where it throws any
// other exception, each with one line on stderr.
int run_program(const char* name, const std::function<void()>& body);

}  // namespace smollm2
