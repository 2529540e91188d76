// SPDX-License-Identifier: Apache-2.0
// What one read of the keys leaves of a row and a chunk, and how that becomes a softmax.
#pragma once

#include <cmath>
#include <cstring>
#include <numbers>

#include "refreekv/core/config.hpp"

namespace refreekv::inline v0 {

/// What one read of a chunk leaves of one row. A row's values in a chunk are exp(logit) /
/// 2^exponent, with 2^exponent at most 2^50 below the largest, so that a float does not underflow
/// where another chunk, the sinks say, has all the mass: candidates are told apart down to 1e-154
/// of it, where the square of a double ends. Units are whole, so that chunks are compared without
/// an exp. (ours)
struct chunk_statistics {
  float exponent;     ///< -inf where the row sees nothing of the chunk
  float sum;          ///< of the values
  float sum_squares;  ///< of the values
};

/// The softmax normaliser of one row.
struct row_normaliser {
  float exponent;  ///< the largest of its chunks
  double sum;      ///< of exp(logit) / 2^exponent

  /// False where NaN or Inf in what the row sees leaves it without a softmax.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool exists() const noexcept {
    return sum > 0 && sum < HUGE_VAL;
  }
  /// The logarithm of what the row's exponentials sum to.
  [[nodiscard]] REFREEKV_HOST_DEVICE double log_sum() const noexcept {
    return static_cast<double>(exponent) * std::numbers::ln2 + std::log(sum);
  }
};

namespace detail {

/// 2^n for a whole n; 0 where that would be denormal, infinity from n = 1024 on. NaN stays NaN.
[[nodiscard]] REFREEKV_HOST_DEVICE inline double power_of_two(float n) noexcept {
  if (n < -1022) return 0;
  if (!(n < 1024))
    return static_cast<double>(n) * HUGE_VAL;  // no function, which device code could not call
  const std::uint64_t bits = static_cast<std::uint64_t>(static_cast<int>(n) + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

/// The attention that a value of 1 in a chunk stands for. NaN for a row without a normaliser:
/// nothing is decided on it.
[[nodiscard]] REFREEKV_HOST_DEVICE inline double weight_of(float exponent,
                                                           const row_normaliser& row) noexcept {
  return power_of_two(exponent - row.exponent) / row.sum;
}

/// Joins the statistics [chunk] of a row; `sink_logit` is -inf where the model has none.
[[nodiscard]] REFREEKV_HOST_DEVICE inline row_normaliser normalise(const chunk_statistics* row,
                                                                   index_t chunks,
                                                                   float sink_logit) noexcept {
  const double sink = static_cast<double>(sink_logit) / std::numbers::ln2;
  row_normaliser n{static_cast<float>(std::rint(sink)), 0};
  for (index_t c = 0; c < chunks; ++c)
    n.exponent = row[c].exponent > n.exponent ? row[c].exponent : n.exponent;
  // The exp2 that compilers put in its place under -funsafe-math-optimizations knows no infinity.
  n.sum = sink <= -HUGE_VAL ? 0 : std::exp2(sink - static_cast<double>(n.exponent));
  for (index_t c = 0; c < chunks; ++c) {
    n.sum += static_cast<double>(row[c].sum) * power_of_two(row[c].exponent - n.exponent);
  }
  return n;
}

}  // namespace detail

}  // namespace refreekv::inline v0
