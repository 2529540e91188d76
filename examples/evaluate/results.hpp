// SPDX-License-Identifier: Apache-2.0
// All measurements: rows of methods, columns of prompts.
#pragma once

#include <string>
#include <vector>

#include "evaluation.hpp"

namespace evaluate {

struct evaluated_prompt {
  std::string name;
  std::size_t tokens;           // of the prompt
  std::size_t compared_tokens;  // of the answer
};

struct result_row {
  std::string method;
  std::string options;
  std::string budget;  // empty for methods that have none
  std::string line;    // in the picture; empty for none
  std::vector<measurement> of_prompts;

  std::string label() const;  // options and budget
};

struct results {
  std::vector<evaluated_prompt> prompts;
  std::vector<result_row> rows;

  // Over the prompts, weighted by compared tokens; the largest KL is that of any token.
  measurement mean(const result_row& row) const;
};

}  // namespace evaluate
