// SPDX-License-Identifier: Apache-2.0
// The statistics that one read of the keys writes for a row and a chunk, and the softmax normaliser
// of a row.
#pragma once

#include <cmath>
#include <cstring>
#include <numbers>

#include "refreekv/core/config.hpp"

namespace refreekv::inline v0 {

/// The statistics of one query row over one chunk, from one read of the chunk's keys. A row's
/// values in a chunk are exp(logit) / 2^exponent; 2^exponent is smaller than the largest exp(logit)
/// by a factor of at most 2^50. Each chunk has its own exponent, so that a float does not underflow
/// where another chunk, for example that of the sinks, has all the mass. Candidates are resolved
/// down to 1e-154 of that mass, where the square of a double underflows. Exponents are whole
/// numbers, so that chunks are compared without an exp. (ours)
struct chunk_statistics {
  float exponent;     ///< -inf where the row sees no token of the chunk
  float sum;          ///< sum of the values
  float sum_squares;  ///< sum of the squared values
};

/// The softmax normaliser of one row.
struct row_normaliser {
  float exponent;  ///< the largest exponent of its chunks and of its sink logit
  double sum;      ///< sum of exp(logit) / 2^exponent

  /// False where the row has no softmax, because it sees a NaN or an Inf.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool exists() const noexcept {
    return sum > 0 && sum < HUGE_VAL;
  }
  /// The logarithm of the sum of the row's exponentials.
  [[nodiscard]] REFREEKV_SHARED double log_sum() const noexcept {
    return static_cast<double>(exponent) * std::numbers::ln2 + std::log(sum);
  }
};

namespace detail {

/// Values of a chunk are exp(logit) / 2^exponent only for exponents below this. Larger logits have
/// 3 bits after the binary point at most, and are exact relative to the chunk's largest one.
inline constexpr float exponent_limit = 0x1p21f;

/// ln 2 in two parts. The first, times a whole number up to 2^14, is exact in a float. So x minus
/// that product, plus the second part times the number, is exp's reduced argument.
inline constexpr float ln2_first = 0.693359375f, ln2_rest = 2.12194440e-4f;

/// 2^n for a whole n: 0 where the result would be denormal, infinity from n = 1024 on. NaN stays
/// NaN.
[[nodiscard]] REFREEKV_SHARED double power_of_two(float n) noexcept {
  if (n < -1022) return 0;
  if (!(n < 1024))
    return static_cast<double>(n) * HUGE_VAL;  // no function call: device code could not make it
  const std::uint64_t bits = static_cast<std::uint64_t>(static_cast<int>(n) + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

/// The attention of a value of 1 in a chunk of that exponent. NaN for a row without a normaliser,
/// so that nothing is decided on it.
[[nodiscard]] REFREEKV_SHARED double weight_of(float exponent, const row_normaliser& row) noexcept {
  return power_of_two(exponent - row.exponent) / row.sum;
}

/// The normaliser of a row, from its statistics [chunk]. `sink_logit` is -inf where the model has
/// none. O(chunks).
[[nodiscard]] REFREEKV_SHARED row_normaliser normalise(const chunk_statistics* row, index_t chunks,
                                                       float sink_logit) noexcept {
  const double sink = static_cast<double>(sink_logit) / std::numbers::ln2;
  row_normaliser n{static_cast<float>(std::rint(sink)), 0};
  for (index_t c = 0; c < chunks; ++c)
    n.exponent = row[c].exponent > n.exponent ? row[c].exponent : n.exponent;
  // Under -funsafe-math-optimizations compilers use an exp2 that does not handle infinity.
  n.sum = sink <= -HUGE_VAL ? 0 : std::exp2(sink - static_cast<double>(n.exponent));
  for (index_t c = 0; c < chunks; ++c) {
    n.sum += static_cast<double>(row[c].sum) * power_of_two(row[c].exponent - n.exponent);
  }
  return n;
}

}  // namespace detail

}  // namespace refreekv::inline v0
