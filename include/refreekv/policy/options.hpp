// SPDX-License-Identifier: Apache-2.0
// Options of policies as data: a name, a range and a sentence for each, from which range checks,
// command lines and bindings are made.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>

#include "refreekv/backend/norm_scan.hpp"
#include "refreekv/backend/token_scores.hpp"
#include "refreekv/policy/budget.hpp"

namespace refreekv::inline v0 {

/// The allowed values of a numeric option, and their name in error messages. NaN is
/// never allowed.
struct option_range {
  double low;
  double high;
  const char* words;       ///< follows "must be"; empty for an option that may have any value
  bool above_low = false;  ///< whether `low` itself is not allowed
};
inline constexpr option_range any_share{0, 1, "in [0, 1]"};
inline constexpr option_range any_count{0, max_count, ">= 0"};
inline constexpr option_range at_least_one{1, max_count, ">= 1"};
inline constexpr option_range positive{0, HUGE_VAL, "> 0", true};

/// The range of an option of type T that specifies no range. A double has to specify one.
template <class T>
  requires(!std::is_same_v<T, double>)
inline constexpr option_range default_range{0, 0, ""};
template <>
inline constexpr option_range default_range<count_t> = any_count;
template <>
inline constexpr option_range default_range<token_budget>{0, 0,
                                                          ">= 0 tokens, or a share in [0, 1]"};
template <>
inline constexpr option_range default_range<pooling>{0, 0, "odd"};

/// One option of a policy. T is double, count_t, bool, token_budget, pooling, or an enumeration
/// with `choices_of`. Only double and count_t are checked against `range`; token_budget and pooling
/// have their own valid().
template <class Policy, class T>
struct option {
  const char* name;  ///< of the member
  T Policy::*member;
  const char* help;  ///< one sentence or phrase, without a full stop
  option_range range;
  std::array<char, 96> error = {};  ///< the message of a value outside the range

  consteval option(const char* name_, T Policy::*member_, const char* help_,
                   option_range range_ = default_range<T>) noexcept
      : name(name_), member(member_), help(help_), range(range_) {
    std::size_t length = 0;
    const auto append = [&](const char* text) {
      while (*text != 0) error[length++] = *text++;
    };
    append(name);
    append(std::is_same_v<T, pooling> ? ".width must be " : " must be ");
    append(range.words);
  }

  /// Null, or why the policy's value is not allowed, in words that begin with the option's name.
  /// The words live as long as the option. O(1).
  [[nodiscard]] constexpr const char* why_invalid(const Policy& policy) const noexcept {
    const T& value = policy.*member;
    bool valid = true;
    if constexpr (requires { value.valid(); }) {
      valid = value.valid();
    } else if constexpr (std::is_same_v<T, double> || std::is_same_v<T, count_t>) {
      const auto number = static_cast<double>(value);
      valid = (range.above_low ? number > range.low : number >= range.low) && number <= range.high;
    }
    return valid ? nullptr : error.data();
  }
};

/// A value of an enumeration, and its name in command lines and bindings.
template <class E>
struct choice {
  const char* name;
  E value;
};
template <class E>
choice(const char*, E) -> choice<E>;

/// Returns all values of an enumeration. Found by argument-dependent lookup.
[[nodiscard]] constexpr auto choices_of(row_average) noexcept {
  return std::array{choice{"mean", row_average::mean}, choice{"frobenius", row_average::frobenius}};
}
[[nodiscard]] constexpr auto choices_of(norm_scope) noexcept {
  return std::array{choice{"candidates", norm_scope::candidates},
                    choice{"full_row", norm_scope::full_row}};
}
[[nodiscard]] constexpr auto choices_of(cut_scope) noexcept {
  return std::array{choice{"layer", cut_scope::layer}, choice{"kv_head", cut_scope::kv_head}};
}
[[nodiscard]] constexpr auto choices_of(pool_kind) noexcept {
  return std::array{choice{"average", pool_kind::average}, choice{"max", pool_kind::max}};
}

/// A policy whose options are data: `Policy::options`, a tuple of `option`.
template <class Policy>
concept has_options =
    requires { std::tuple_size<std::remove_cvref_t<decltype(Policy::options)>>{}; };

/// Calls f(option) for each option of a policy, in the order of its members.
template <has_options Policy, class F>
constexpr void for_each_option(const F& f) {
  std::apply([&](const auto&... each) { (f(each), ...); }, Policy::options);
}

/// Null, or which option of a policy is outside its range, in words. Then, if the policy has it,
/// the result of `invalid()`: for options that depend on each other, and for policies without
/// `options`. O(options).
template <class Policy>
  requires has_options<Policy> || requires(const Policy& policy) { policy.invalid(); }
[[nodiscard]] constexpr const char* why_invalid(const Policy& policy) noexcept {
  const char* why = nullptr;
  if constexpr (has_options<Policy>) {
    for_each_option<Policy>([&](const auto& each) {
      if (why == nullptr) why = each.why_invalid(policy);
    });
  }
  if constexpr (requires { policy.invalid(); }) {
    if (why == nullptr) why = policy.invalid();
  }
  return why;
}

}  // namespace refreekv::inline v0
