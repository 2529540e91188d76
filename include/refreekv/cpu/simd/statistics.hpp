// SPDX-License-Identifier: Apache-2.0
// From logits to the statistics of a chunk: of a stored row, or of a tile in passing.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "refreekv/attention/chunk_statistics.hpp"
#include "refreekv/cpu/simd/dot.hpp"
#include "refreekv/cpu/simd/exp.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Makes the logits [count] of one row whole registers, of which the last are -inf, and returns the
/// unit of their values: the power of two that is nearest to the largest. O(count).
inline float exponent_of(float* logits, index_t count) noexcept {
  constexpr float none = -std::numeric_limits<float>::infinity();
  const index_t padded = (count + lane_count - 1) / lane_count * lane_count;
  std::fill(logits + count, logits + padded, none);
  lanes largest = splat(none);
  for (index_t t = 0; t < padded; t += lane_count) largest = larger(largest, load(logits + t));
  const float peak = largest_of(largest);
  const float exponent = std::rint(peak * std::numbers::log2e_v<float>);
  if (peak > none && !(std::abs(exponent) < exponent_limit)) {
    // Logits without digits after the point. Relative to their peak they are exact.
    for (index_t t = 0; t < count; ++t) logits[t] -= peak;
  }
  return exponent;
}

/// Turns logits into values exp(logit) / 2^exponent: nearly 0 where a logit is -inf, NaN where it
/// is NaN or +Inf. After exponent_of. O(count).
inline chunk_statistics exponentiate(float* values, index_t count, float exponent) noexcept {
  const float local = std::abs(exponent) < exponent_limit ? exponent : 0;
  const lanes lowest = splat((local + lowest_power) * std::numbers::ln2_v<float>);
  const lanes shifted_unit = splat(local + integer_shift);
  lanes sum = splat(0), sum_squares = splat(0);
  for (index_t t = 0; t < count; t += lane_count) {
    const lanes value = exponential(larger(load(values + t), lowest), shifted_unit);
    store(value, values + t);
    sum += value;
    sum_squares += value * value;
  }
  return {exponent, sum_of(sum), sum_of(sum_squares)};
}

/// The statistics of a register of results, four tokens of each row at a time, without a look back:
/// units are those of the first four, and values above 2^highest_power of them do not fit.
class running_statistics {
 public:
  static constexpr float highest_power = 50;

  /// The first logits.
  REFREEKV_ALWAYS_INLINE void start(const lanes& x) noexcept {
    const auto fold = [](const lanes& y, auto swapped) {
      return larger(y, shuffle(y, y, swapped));
    };
    largest_ = fold(fold(x, [](int i) { return i ^ 1; }), [](int i) { return i ^ 2; });
    // Whole numbers, or beyond the limits that `finish` looks at.
    shifted_exponent_ = exactly<lanes>(largest_ * std::numbers::log2e_v<float> + integer_shift);
    lowest_ = (shifted_exponent_ - integer_shift + lowest_power) * std::numbers::ln2_v<float>;
    pending_ = x;
  }
  /// All others. What is added waits for the next call: its exponentials have the time that the
  /// sums of the next tile take, and do not stand in their way.
  REFREEKV_ALWAYS_INLINE void add(const lanes& x) noexcept {
    add_pending();
    pending_ = x;
  }
  /// Writes the statistics of `rows` rows; false where they have to be found another way.
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
