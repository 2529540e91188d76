// SPDX-License-Identifier: Apache-2.0
// The options of a policy as the arguments of an operator: their declarations, and the policy that
// their values make.
#pragma once

#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>

#include <charconv>
#include <concepts>
#include <refreekv/policy/options.hpp>
#include <string>
#include <vector>

namespace refreekv_torch {

namespace kv = refreekv;

/// The values of an operator's arguments, by name.
class arguments {
 public:
  /// Requires that the last values of the stack are those of the schema's arguments.
  arguments(const c10::FunctionSchema& schema, const std::vector<c10::IValue>& stack)
      : schema_(schema), first_(stack.data() + stack.size() - schema.arguments().size()) {}

  /// Null if the operator has no such argument.
  [[nodiscard]] const c10::IValue* find(const std::string& name) const {
    const auto index = schema_.argumentIndexWithName(name);
    return index ? first_ + *index : nullptr;
  }
  /// Requires that the operator has the argument.
  [[nodiscard]] const c10::IValue& operator[](const std::string& name) const { return *find(name); }

 private:
  const c10::FunctionSchema& schema_;
  const c10::IValue* first_;
};

/// Calls f(name, value) for each argument of a policy. A pooling is two arguments.
template <class Policy, class F>
void for_each_argument(Policy& policy, const F& f) {
  kv::for_each_option<std::remove_const_t<Policy>>([&](const auto& option) {
    auto& value = policy.*option.member;
    if constexpr (requires { value.width; }) {
      f(std::string(option.name), value.kind);
      f(option.name + std::string("_width"), value.width);
    } else {
      f(std::string(option.name), value);
    }
  });
}

/// Returns the shortest text of a number that reads as the same number.
inline std::string text_of(double number) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, number).ptr};
}

/// Returns an argument with its default, as a schema has it. A budget is a Scalar: an int is
/// tokens, a float is a share.
inline std::string declaration(const std::string& name, double value) {
  return "float " + name + "=" + text_of(value);
}
inline std::string declaration(const std::string& name, kv::count_t value) {
  return "int " + name + "=" + std::to_string(value);
}
inline std::string declaration(const std::string& name, bool value) {
  return "bool " + name + (value ? "=True" : "=False");
}
inline std::string declaration(const std::string& name, const kv::token_budget& value) {
  const std::string amount = text_of(value.amount());
  const bool whole = amount.find_first_of(".e") == std::string::npos;
  return "Scalar " + name + "=" + amount + (value.is_share() && whole ? ".0" : "");
}
template <class Enumeration>
  requires std::is_enum_v<Enumeration>
std::string declaration(const std::string& name, Enumeration value) {
  std::string text = "str " + name;
  for (const auto& choice : choices_of(value)) {
    if (choice.value == value) text += "=\"" + std::string(choice.name) + "\"";
  }
  return text;
}

/// A number that does not fit becomes a count that the library refuses, by the option's name.
inline kv::count_t count_of(int64_t value) {
  return static_cast<kv::count_t>(value < 0 || value > kv::max_count ? ~kv::count_t{0} : value);
}

/// Writes the value of an argument to an option.
inline void assign(const std::string&, const c10::IValue& given, double& value) {
  value = given.toDouble();
}
inline void assign(const std::string&, const c10::IValue& given, kv::count_t& value) {
  value = count_of(given.toInt());
}
inline void assign(const std::string&, const c10::IValue& given, bool& value) {
  value = given.toBool();
}
inline void assign(const std::string& name, const c10::IValue& given, kv::token_budget& value) {
  TORCH_CHECK(given.isInt() || given.isDouble(), "refreekv: ", name,
              " must be an int, in tokens, or a float, a share");
  value =
      given.isInt() ? kv::token_budget(given.toInt()) : kv::token_budget::share(given.toDouble());
}
template <class Enumeration>
  requires std::is_enum_v<Enumeration>
void assign(const std::string& name, const c10::IValue& given, Enumeration& value) {
  constexpr auto choices = choices_of(Enumeration{});
  const std::string& chosen = given.toStringRef();
  std::string names;
  for (std::size_t i = 0; i < choices.size(); ++i) {
    if (chosen == choices[i].name) {
      value = choices[i].value;
      return;
    }
    names += i == 0 ? "" : i + 1 < choices.size() ? ", " : " or ";
    names += choices[i].name;
  }
  TORCH_CHECK(false, "refreekv: ", name, " must be ", names, ", not ", chosen);
}

/// Returns the policy of an operator's arguments. An option that is no argument has its default.
template <class Policy>
Policy policy_of(const arguments& given) {
  Policy policy;
  for_each_argument(policy, [&](const std::string& name, auto& value) {
    if (const c10::IValue* argument = given.find(name)) assign(name, *argument, value);
  });
  return policy;
}

}  // namespace refreekv_torch
