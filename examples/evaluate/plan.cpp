// SPDX-License-Identifier: Apache-2.0
#include "plan.hpp"

#include <algorithm>

namespace evaluate {

std::vector<planned_row> plan(const options& opts) {
  const auto is_chosen = [&](const variant& each) {
    return std::find(opts.methods.begin(), opts.methods.end(), each.method) != opts.methods.end();
  };
  bool needs_budget = false;
  for (const variant& each : all_variants()) {
    needs_budget = needs_budget || (each.has_budget && is_chosen(each));
  }
  std::vector<const variant*> references;
  for (const named_budget& budget : opts.budgets) {
    if (budget.reference != nullptr && needs_budget) references.push_back(budget.reference);
  }

  std::vector<planned_row> rows;
  std::vector<const variant*> sized_by;  // [row], null for none
  for (const variant& each : all_variants()) {
    const bool refers = std::find(references.begin(), references.end(), &each) != references.end();
    if (!is_chosen(each) && !refers) continue;
    if (!each.has_budget) {
      rows.push_back({&each, "", 1, std::nullopt});
      sized_by.push_back(nullptr);
      continue;
    }
    for (const named_budget& budget : opts.budgets) {
      rows.push_back({&each, budget.name, budget.share, std::nullopt});
      sized_by.push_back(budget.reference);
    }
  }
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (sized_by[i] == nullptr) continue;
    const auto is_reference = [&](const planned_row& row) { return row.entry == sized_by[i]; };
    const auto reference = std::find_if(rows.begin(), rows.end(), is_reference);
    rows[i].reference = static_cast<std::size_t>(reference - rows.begin());
  }
  return rows;
}

std::size_t window_of(const std::vector<planned_row>& rows, std::size_t tokens) {
  std::size_t window = 1;
  for (const planned_row& row : rows) {
    window = std::max(window, smollm2::window_of(row.entry->policy({tokens, 1})));
  }
  return window;
}

}  // namespace evaluate
