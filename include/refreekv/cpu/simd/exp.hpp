// SPDX-License-Identifier: Apache-2.0
// exp of a vector register, relative to a power of two.
#pragma once

#include <numbers>

#include "refreekv/attention/chunk_statistics.hpp"
#include "refreekv/cpu/simd/lanes.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Values below 2^lowest_power (2e-19), relative to 2^exponent, are raised to that. The square of a
/// smaller value would be denormal: slow, and of negligible weight.
inline constexpr float lowest_power = -62;

using detail::exponent_limit;

/// Returns exp(x) / 2^exponent where that is below 2^127. Requires a whole exponent of magnitude
/// below exponent_limit; shifted_unit is exponent + integer_shift.
/// NaN stays NaN. Requires x >= (exponent - 125) ln 2, so that no result is denormal. The error is
/// within 2 units in the last place for |exponent| up to 1000. Method (ours): x = n ln 2 + r, and
/// on |r| <= ln 2 / 2 the polynomial of degree 6 that starts with 1 + r and has the smallest
/// relative error, 3.1e-9.
REFREEKV_ALWAYS_INLINE lanes exponential(const lanes& x, const lanes& shifted_unit) noexcept {
  const auto shifted = exactly<lanes>(x * std::numbers::log2e_v<float> + integer_shift);
  const lanes n = shifted - integer_shift;
  auto r = exactly<lanes>(x - n * detail::ln2_first);
  r = r + n * detail::ln2_rest;
  lanes p = r * 1.381456968e-3f + 8.368730545e-3f;
  p = p * r + 4.166838899e-2f;
  p = p * r + 1.666652113e-1f;
  p = p * r + 4.999999404e-1f;
  p = p * (r * r) + r;
  const lanes power = two_to_the_difference(shifted, shifted_unit);
  return p * power + power;
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
