// SPDX-License-Identifier: Apache-2.0
// Budgets as people write them: a number of tokens, or a share such as 0.5 or 50%.
#pragma once

#include <optional>
#include <refreekv/policy/budget.hpp>
#include <string>

namespace smollm2 {

// "0.5" or "50%" is 0.5. Nothing for anything else, or where it is not in [0, 1].
std::optional<double> parse_share(const std::string& text);

// A whole number is tokens; what has a point or a per cent sign is a share. Throws usage_error,
// which names the option.
refreekv::token_budget parse_budget(const std::string& text,
                                    const std::string& option = "--budget");

// 0.5 is "50 %".
std::string percent(double share);

}  // namespace smollm2
