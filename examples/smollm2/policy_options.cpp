// SPDX-License-Identifier: Apache-2.0
#include "policy_options.hpp"

#include <algorithm>
#include <concepts>
#include <tuple>
#include <vector>

#include "budget_option.hpp"
#include "command_line.hpp"

namespace smollm2 {

namespace {

// Calls f(name, policy) for every policy with its defaults, and for "none".
template <class F>
void for_each_policy(const F& f) {
  std::apply([&](const auto&... policy) { (f(policy.name, policy), ...); },
             refreekv::all_policies{});
  f("none", keep_everything{});
}

// Calls f(option, value, help, range) for each value of a policy that the command line can set.
// --pool and --pool-width are one option of the policy. The number of layers is the model's.
template <class Policy, class F>
void for_each_value(Policy& policy, const F& f) {
  if constexpr (refreekv::has_options<Policy>) {
    refreekv::for_each_option<Policy>([&](const auto& option) {
      std::string name = std::string("--") + option.name;
      std::replace(name.begin(), name.end(), '_', '-');
      auto& value = policy.*option.member;
      if constexpr (requires { value.width; }) {
        f(name, value.kind, option.help, refreekv::option_range{0, 0, ""});
        f(name + "-width", value.width, "neighbours that a score is pooled over", option.range);
      } else if (name != "--layers") {
        f(name, value, option.help, option.range);
      }
    });
  }
}

template <class T>
std::vector<std::string> names_of_choices() {
  std::vector<std::string> names;
  if constexpr (requires { choices_of(T{}); }) {
    for (const auto& choice : choices_of(T{})) names.push_back(choice.name);
  }
  return names;
}

template <class T>
void parse(const std::string& option, const std::string& text, T& value) {
  if constexpr (std::same_as<T, refreekv::token_budget>) {
    value = parse_budget(text, option);
  } else if constexpr (requires { choices_of(value); }) {
    for (const auto& choice : choices_of(value)) {
      if (choice.name == text) return static_cast<void>(value = choice.value);
    }
    throw usage_error(option + ": '" + text + "' is none of its choices");
  } else if constexpr (std::same_as<T, bool>) {
    if (text != "0" && text != "1") throw usage_error(option + ": '" + text + "' is not 0 or 1");
    value = text == "1";
  } else if (!CLI::detail::lexical_cast(text, value)) {
    throw usage_error(option + ": '" + text + "' is no number that is allowed here");
  }
}

// What a value may be, for the help.
template <class T>
std::string allowed(const refreekv::option_range& range) {
  if constexpr (std::same_as<T, bool>) return "0 or 1";
  if constexpr (std::same_as<T, refreekv::token_budget>) return "tokens, or a share: 0.5, 50%";
  return range.words;
}

}  // namespace

void policy_options::add_to(CLI::App& app) {
  std::vector<std::string> names;
  for_each_policy([&](const char* name, auto policy) {
    names.push_back(name);
    for_each_value(policy, [&]<class T>(const std::string& option, T&, const char* help,
                                        const refreekv::option_range& range) {
      const std::string values = allowed<T>(range);
      const std::string text = values.empty() ? help : std::string(help) + " (" + values + ")";
      if (!texts_.contains(option)) {
        CLI::Option* added = app.add_option(option, texts_[option], text)->group(name);
        if (const auto choices = names_of_choices<T>(); !choices.empty()) {
          added->check(CLI::IsMember(choices));
        }
        return;
      }
      CLI::Option* known = app.get_option(option);
      known->group(known->get_group() + ", " + name);
      if (known->get_description().find(text) == std::string::npos) {
        known->description(known->get_description() + "; " + name + ": " + text);
      }
    });
  });
  app.add_option("--policy", name_, "its options are its own where they are not given")
      ->check(CLI::IsMember(names));
}

pruning_policy policy_options::chosen() const {
  pruning_policy result;
  for_each_policy([&](const char* name, const auto& policy) {
    if (name == name_) result = policy;
  });
  auto unused = texts_;
  std::visit(
      [&](auto& policy) {
        for_each_value(policy,
                       [&](const std::string& option, auto& value, const char*, const auto&) {
                         if (const auto& text = texts_.at(option)) parse(option, *text, value);
                         unused.erase(option);
                       });
      },
      result);
  for (const auto& [option, text] : unused) {
    if (text) throw usage_error(option + " is no option of " + name_);
  }
  if (const char* reason = why_invalid(result)) throw usage_error(reason);
  return result;
}

}  // namespace smollm2
