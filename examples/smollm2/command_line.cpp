// SPDX-License-Identifier: Apache-2.0
#include "command_line.hpp"

#include <iostream>

namespace smollm2 {

bool parse(CLI::App& app, int argc, char** argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    app.exit(help);
    return false;
  } catch (const CLI::ParseError& error) {
    throw usage_error(std::string(error.what()) + " (see --help)");
  }
  return true;
}

int run_program(const char* name, const std::function<void()>& body) {
  const auto fail = [&](const std::exception& error, int code) {
    std::cerr << name << ": " << error.what() << '\n';
    return code;
  };
  try {
    body();
  } catch (const usage_error& error) {
    return fail(error, 2);
  } catch (const std::exception& error) {
    return fail(error, 1);
  }
  return 0;
}

}  // namespace smollm2
