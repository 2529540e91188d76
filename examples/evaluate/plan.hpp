// SPDX-License-Identifier: Apache-2.0
// Which rows a table will have.
#pragma once

#include <optional>

#include "options.hpp"

namespace evaluate {

// A row before it has results.
struct planned_row {
  const variant* entry;
  std::string budget;                    // empty for methods that have none
  double share;                          // of a prompt that may stay, where there is no reference
  std::optional<std::size_t> reference;  // the row that says what share, for each prompt
};

// In the catalogue's order: variants of the chosen methods, with each budget where they need one,
// and what budgets refer to.
std::vector<planned_row> plan(const options& opts);

// The most queries of a prompt of `tokens` tokens that any row looks at.
std::size_t window_of(const std::vector<planned_row>& rows, std::size_t tokens);

}  // namespace evaluate
