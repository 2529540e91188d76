// SPDX-License-Identifier: Apache-2.0
// The options of every program that runs a model on a prompt and prunes its cache.
#pragma once

#include <CLI/CLI.hpp>
#include <filesystem>
#include <string>

#include "policy_options.hpp"

namespace smollm2 {

struct run_settings {
  std::filesystem::path model;
  std::string prompt;  // the text itself, question included
  pruning_policy policy;
  std::size_t tokens = 64;  // to generate
  int threads = 1;
  bool compare = false;
  bool speed = false;
  std::filesystem::path json;  // empty for none
};

class run_options {
 public:
  // Must outlive the app's parsing.
  void add_to(CLI::App& app);

  // Throws usage_error for options that cannot be, and std::runtime_error for files that cannot be
  // read.
  run_settings settings() const;

 private:
  run_settings given_;
  policy_options policies_;
  std::string question_;
  std::filesystem::path prompt_file_;
};

}  // namespace smollm2
