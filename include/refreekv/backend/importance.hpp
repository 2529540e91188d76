// SPDX-License-Identifier: Apache-2.0
// What backends need to know of the faithful rule: how it weighs the tokens of a layer, in what
// sizes it offers them, and when a size is enough. The rule itself is in policy/faithful.hpp.
#pragma once

#include <cmath>

#include "refreekv/attention/query_window.hpp"
#include "refreekv/backend/norm_scan.hpp"

namespace refreekv::inline v0 {

/// The smallest size that keeps a token: 0 where it stays whatever the size is, `grade_never` where
/// no later query can see it and it goes.
using grade = std::uint8_t;
inline constexpr grade grade_never = 255;

/// The most sizes that a rule may offer.
inline constexpr index_t max_sizes = 64;

/// The options of policy::faithful that its primitives go by; `rows` are the last ones that the
/// observation has, as many as its window.
struct importance_rule {
  double tolerance;
  index_t rows;
  count_t sinks, recent, block, sizes, error_rows;
  double last_row, prior, ridge;
  bool stand_ins, error_term;
  cut_scope scope;

  /// The tokens of a sequence that are weighed: those that any row of the window sees.
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr token_range seen_by(
      const query_window& window) noexcept {
    return {window.hull().begin, window.tokens};
  }
  /// Those of them that may go.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_range candidates(
      const query_window& window) const noexcept {
    const index_t quarter = window.tokens / 4;
    const index_t last = quarter < recent ? quarter : index_t{recent};
    const index_t end = window.tokens - (last > 0 ? last : 1);
    index_t begin = seen_by(window).begin;
    if (begin < sinks) begin = sinks;
    return {begin, end > begin ? end : begin};
  }
  /// The tokens over which the spread of a head's logits is measured: neither the first four nor
  /// the last sixteen, which attention treats unlike all others; one token at least.
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr token_range typical(
      const query_window& window) noexcept {
    const auto [begin, end] = seen_by(window);
    const index_t first = begin + 4 < end ? begin + 4 : end - 1;
    return {first, end - 16 > first + 1 ? end - 16 : first + 1};
  }
  /// How many of `count` candidates a size keeps.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t kept_by(index_t size,
                                                               index_t count) const noexcept {
    return (count * size + sizes - 1) / sizes;
  }
  /// Whether the error is measured on one of `count` rows: on the last one, and on every
  /// `error_rows`-th before it.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool measures(index_t row,
                                                             index_t count) const noexcept {
    return (count - 1 - row) % error_rows == 0;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t measured(index_t count) const noexcept {
    return (count + error_rows - 1) / error_rows;
  }
  /// Whether a size is enough. NaN never is. (ours)
  [[nodiscard]] REFREEKV_HOST_DEVICE bool is_enough(double lost, double error) const noexcept {
    return tolerance > 0 && (error_term ? std::sqrt(error * lost) : lost) <= tolerance;
  }
  /// The smallest size that is enough, by bisection: the largest size always is. enough(size).
  template <class Enough>
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t smallest(
      const Enough& enough) const noexcept {
    index_t low = -1, high = sizes;
    while (high - low > 1) {
      const index_t middle = low + (high - low) / 2;
      (enough(middle) ? high : low) = middle;
    }
    return high;
  }
  /// Slots that a sequence's stand-ins may take: one a block.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t blocks(index_t tokens) const noexcept {
    return (tokens + block - 1) / block;
  }
};

namespace detail {

/// Whether the sum of so many directions has one: what is left where they cancel is rounding.
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool has_direction(double length,
                                                                index_t tokens) noexcept {
  return !(length <= 1e-12 * static_cast<double>(tokens));
}

}  // namespace detail

}  // namespace refreekv::inline v0
