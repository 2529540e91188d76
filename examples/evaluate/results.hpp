// SPDX-License-Identifier: Apache-2.0
// All measurements: rows of methods, columns of prompts.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "evaluation.hpp"

namespace evaluate {

struct evaluated_prompt {
  std::string name;
  std::size_t tokens;           // of what is pruned
  std::size_t compared_tokens;  // of the answer
  bool has_key;
  bool recalls_key;  // with the full cache
};

struct result_row {
  std::string method;
  std::string options;
  std::string budget;                    // empty for methods that have none
  std::optional<std::size_t> reference;  // the row whose sizes it has
  std::string line;                      // in the picture; empty for none
  std::vector<measurement> of_prompts;

  std::string label() const;  // options and budget
};

struct results {
  std::vector<evaluated_prompt> prompts;
  std::vector<result_row> rows;

  // Over the prompts, weighted by compared tokens; the largest KL is that of any token.
  measurement mean(const result_row& row) const;

  // Of the prompts' mean KL.
  double median_kl(const result_row& row) const;

  // On how many prompts the row's mean KL is larger than that of its reference, which it has.
  std::size_t farther(const result_row& row) const;
};

}  // namespace evaluate
