// SPDX-License-Identifier: Apache-2.0
// The options of policy::faithful that backends need: how the tokens of a layer are weighed, in
// what sizes they are offered, and when a size is enough. The policy is in policy/faithful.hpp.
#pragma once

#include <cmath>

#include "refreekv/attention/query_window.hpp"
#include "refreekv/backend/norm_scan.hpp"

namespace refreekv::inline v0 {

/// The smallest size that keeps a token. 0: every size keeps it. `grade_never`: no size keeps it,
/// because no later query can see it.
using grade = std::uint8_t;
inline constexpr grade grade_never = 255;

/// The largest number of sizes that a policy may offer.
inline constexpr index_t max_sizes = 64;

/// The options of policy::faithful that its primitives use. `rows`: how many of the last rows of
/// the layer's window are used.
struct importance_rule {
  double tolerance;
  index_t rows;
  count_t sinks, recent, block, sizes, error_rows;
  double last_row, prior, ridge;
  bool stand_ins, error_term;
  cut_scope scope;

  /// The tokens of a sequence that are weighed: from the first that any row of the window sees to
  /// the sequence's end.
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr token_range seen_by(
      const query_window& window) noexcept {
    return {window.hull().begin, window.tokens};
  }
  /// The weighed tokens that may be dropped. Excludes the sinks and the last `recent` tokens; the
  /// latter are at most a quarter of the sequence, but at least one token.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_range candidates(
      const query_window& window) const noexcept {
    const index_t quarter = window.tokens / 4;
    const index_t last = quarter < recent ? quarter : index_t{recent};
    const index_t end = window.tokens - (last > 0 ? last : 1);
    index_t begin = seen_by(window).begin;
    if (begin < sinks) begin = sinks;
    return {begin, end > begin ? end : begin};
  }
  /// The tokens over which the spread of a head's logits is measured, at least one. Excludes the
  /// first four and the last sixteen weighed tokens, which attention treats unlike all others.
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr token_range typical(
      const query_window& window) noexcept {
    const auto [begin, end] = seen_by(window);
    const index_t first = begin + 4 < end ? begin + 4 : end - 1;
    return {first, end - 16 > first + 1 ? end - 16 : first + 1};
  }
  /// The number of candidates that a size keeps, of `count` in all.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t kept_by(index_t size,
                                                               index_t count) const noexcept {
    return (count * size + sizes - 1) / sizes;
  }
  /// Whether the error is measured on this row of `count` rows: on the last one, and on every
  /// `error_rows`-th before it.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool measures(index_t row,
                                                             index_t count) const noexcept {
    return (count - 1 - row) % error_rows == 0;
  }
  /// The number of rows on which the error is measured, of `count` in all.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t measured(index_t count) const noexcept {
    return (count + error_rows - 1) / error_rows;
  }
  /// Whether a size is enough. NaN is never enough. (ours)
  [[nodiscard]] REFREEKV_HOST_DEVICE bool is_enough(double lost, double error) const noexcept {
    return tolerance > 0 && (error_term ? std::sqrt(error * lost) : lost) <= tolerance;
  }
  /// The smallest size that is enough, by bisection on enough(size). The largest size counts as
  /// enough and is not tested. O(log(sizes)) calls.
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
  /// The number of slots that a sequence's stand-ins may occupy: one for each block.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t blocks(index_t tokens) const noexcept {
    return (tokens + block - 1) / block;
  }
};

namespace detail {

/// Whether the sum of `tokens` directions, of that length, has a direction itself. Where directions
/// cancel, only rounding errors remain.
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool has_direction(double length,
                                                                index_t tokens) noexcept {
  return !(length <= 1e-12 * static_cast<double>(tokens));
}

}  // namespace detail

}  // namespace refreekv::inline v0
