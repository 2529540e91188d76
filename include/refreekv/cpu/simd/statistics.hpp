// SPDX-License-Identifier: Apache-2.0
// Turns logits into chunk statistics, from a stored row or on the fly from a register tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "refreekv/attention/chunk_statistics.hpp"
#include "refreekv/cpu/simd/dot.hpp"
#include "refreekv/cpu/simd/exp.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Pads the logits [count] of one row with -inf to whole registers. Returns the exponent of their
/// values: that of the power of two nearest to the largest. O(count).
inline float exponent_of(float* logits, index_t count) noexcept {
  constexpr float none = -std::numeric_limits<float>::infinity();
  const index_t padded = (count + lane_count - 1) / lane_count * lane_count;
  std::fill(logits + count, logits + padded, none);
  lanes largest = splat(none);
  for (index_t t = 0; t < padded; t += lane_count) largest = larger(largest, load(logits + t));
  const float peak = largest_of(largest);
  const float exponent = std::rint(peak * std::numbers::log2e_v<float>);
  if (peak > none && !(std::abs(exponent) < exponent_limit)) {
    for (index_t t = 0; t < count; ++t) logits[t] -= peak;
  }
  return exponent;
}

/// What becomes of values that are small relative to 2^exponent.
enum class tiny_values {
  raised,  ///< below 2^lowest_power raised to that, so that squares are normal numbers
  exact,   ///< below 2^vanishing_power 0; squares are not summed
};
inline constexpr float vanishing_power = -120;

/// Turns logits [count] into values exp(logit) / 2^exponent, and returns their statistics. The
/// smallest are as `tiny` says; a value is NaN for NaN or +Inf. Requires logits padded by
/// exponent_of. O(count).
template <tiny_values tiny = tiny_values::raised>
chunk_statistics exponentiate(float* values, index_t count, float exponent) noexcept {
  constexpr float smallest = tiny == tiny_values::exact ? vanishing_power : lowest_power;
  const float local = std::abs(exponent) < exponent_limit ? exponent : 0;
  const lanes lowest = splat((local + smallest) * std::numbers::ln2_v<float>);
  const lanes shifted_unit = splat(local + integer_shift);
  lanes sum = splat(0), sum_squares = splat(0);
  for (index_t t = 0; t < count; t += lane_count) {
    const lanes logits = load(values + t);
    lanes value = exponential(larger(logits, lowest), shifted_unit);
    if constexpr (tiny == tiny_values::exact) value = zero_below(logits, lowest, value);
    store(value, values + t);
    sum += value;
    if constexpr (tiny == tiny_values::raised) sum_squares += value * value;
  }
  return {exponent, sum_of(sum), sum_of(sum_squares)};
}

/// Statistics of a register of results, with four tokens of each row at a time, in one pass. The
/// first four tokens set the exponents. Values above 2^highest_power relative to these do not fit.
class running_statistics {
 public:
  static constexpr float highest_power = 50;

  /// Adds the first logits, which set the exponents.
  REFREEKV_ALWAYS_INLINE void start(const lanes& x) noexcept {
    const auto fold = [](const lanes& y, auto swapped) {
      return larger(y, shuffle(y, y, swapped));
    };
    largest_ = fold(fold(x, [](int i) { return i ^ 1; }), [](int i) { return i ^ 2; });
    // Whole numbers, or outside the limits that `finish` checks.
    shifted_exponent_ = exactly<lanes>(largest_ * std::numbers::log2e_v<float> + integer_shift);
    lowest_ = (shifted_exponent_ - integer_shift + lowest_power) * std::numbers::ln2_v<float>;
    pending_ = x;
  }
  /// Adds further logits. x is processed at the next call: its exponentials then overlap with the
  /// sums of the next tile, and do not delay them.
  REFREEKV_ALWAYS_INLINE void add(const lanes& x) noexcept {
    add_pending();
    pending_ = x;
  }
  /// Writes the statistics of `rows` rows. Returns false if an exponent reaches exponent_limit or a
  /// value 2^highest_power; the statistics must then be found another way.
  bool finish(index_t rows, chunk_statistics* statistics) noexcept {
    add_pending();
    for (index_t r = 0; r < rows; ++r) {
      const auto total = [&](const lanes& x) {
        const auto i = [&](int t) { return x[static_cast<int>(r * tile_tokens) + t]; };
        return (i(0) + i(1)) + (i(2) + i(3));
      };
      const float exponent = shifted_exponent_[static_cast<int>(r * tile_tokens)] - integer_shift;
      for (int t = 0; t < tile_tokens; ++t) {
        const float x = largest_[static_cast<int>(r * tile_tokens) + t];
        const float power = x * std::numbers::log2e_v<float> - exponent;
        if (!(std::abs(exponent) < exponent_limit) || !(power < highest_power)) return false;
      }
      statistics[r] = {exponent, total(sum_), total(sum_squares_)};
    }
    return true;
  }

 private:
  REFREEKV_ALWAYS_INLINE void add_pending() noexcept {
    const lanes value = exponential(larger(pending_, lowest_), shifted_exponent_);
    largest_ = larger(largest_, pending_);
    sum_ += value;
    sum_squares_ += value * value;
  }

  lanes shifted_exponent_ = splat(0), lowest_ = splat(0), largest_ = splat(0), pending_ = splat(0);
  lanes sum_ = splat(0), sum_squares_ = splat(0);
};

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
