// SPDX-License-Identifier: Apache-2.0
// The methods that are compared, each with its variants.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "pruning.hpp"

namespace evaluate {

// What a policy may depend on.
struct circumstances {
  std::size_t tokens;  // of the prompt
  double share;        // of the prompt that a method with a budget may keep
};

struct variant {
  std::string method;   // the policy's name
  std::string options;  // that are not the policy's defaults, or "the default" and what it is
  bool has_budget;
  std::function<smollm2::pruning_policy(const circumstances&)> policy;
  std::string line;  // in the picture: variants of one line differ in how much they keep
};

// In the order in which they are printed.
const std::vector<variant>& all_variants();

// Names of methods, each once.
std::vector<std::string> method_names();

// A variant that needs no budget, by its name: "METHOD, OPTIONS", or "METHOD" for its default. Null
// where there is none.
const variant* find_adaptive(const std::string& name);

}  // namespace evaluate
