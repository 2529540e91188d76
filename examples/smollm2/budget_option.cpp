// SPDX-License-Identifier: Apache-2.0
#include "budget_option.hpp"

#include <charconv>
#include <cstdio>

#include "command_line.hpp"

namespace smollm2 {

namespace {

// The number that all of the text is.
template <class Number>
std::optional<Number> number_in(std::string_view text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

}  // namespace

std::optional<double> parse_share(const std::string& text) {
  std::string_view number = text;
  const bool per_cent = number.ends_with('%');
  if (per_cent) number.remove_suffix(1);
  while (number.ends_with(' ')) number.remove_suffix(1);
  const std::optional<double> value = number_in<double>(number);
  if (!value) return std::nullopt;
  const double share = per_cent ? *value / 100 : *value;
  if (!(share >= 0 && share <= 1)) return std::nullopt;
  return share;
}

refreekv::token_budget parse_budget(const std::string& text, const std::string& option) {
  if (const auto tokens = number_in<refreekv::count_t>(text)) return *tokens;
  if (const auto share = parse_share(text)) return refreekv::token_budget::share(*share);
  throw usage_error(option + ": '" + text + "' is neither a number of tokens nor a share such as " +
                    "0.5 or 50%");
}

std::string percent(double share) {
  char text[32];
  std::snprintf(text, sizeof text, "%g %%", 100 * share);
  return text;
}

}  // namespace smollm2
