// SPDX-License-Identifier: Apache-2.0
// The soft cap of a logit, its inverse, and ALiBi; arithmetic that all backends share.
#pragma once

#include <cmath>

#include "refreekv/core/config.hpp"

namespace refreekv::inline v0 {

namespace detail {

/// Returns cap * tanh(x / cap), given 1 / cap and exp(2 x / cap). NaN stays NaN. In double: with a
/// cap of 50 the last digit of a float tanh would be 3e-6 of a logit. tanh is 1 - 2 / (exp + 1).
/// Where x is small compared with the cap that difference cancels; there the first two terms of the
/// series are used, which are accurate to 1.4e-13.
[[nodiscard]] REFREEKV_SHARED float soft_capped(float x, double cap, double inverse,
                                                double exponential) noexcept {
  const auto wide = static_cast<double>(x);
  const double y = wide * inverse, square = y * y;
  // Both are computed, without a branch, so that compilers vectorise this.
  const double series = wide * (1 - square * (1.0 / 3));
  const double whole = cap * (1 - 2 / (exponential + 1));
  return static_cast<float>(square >= 1e-6 ? whole : series);
}

/// The logit before the soft cap; unchanged if there is no cap. A logit near the cap or above it
/// counts as 0.9 of the cap, because no key could reach more.
[[nodiscard]] REFREEKV_SHARED double uncapped(double logit, double cap) noexcept {
  if (!(cap > 0)) return logit;
  const double part = logit / cap;
  return cap * std::atanh(part > 0.9 ? 0.9 : part < -0.9 ? -0.9 : part);
}

/// Returns a logit plus ALiBi's bias. distance: the token's position minus the query's.
[[nodiscard]] REFREEKV_SHARED float with_alibi(float logit, double slope,
                                               index_t distance) noexcept {
  return static_cast<float>(static_cast<double>(logit) + slope * static_cast<double>(distance));
}

}  // namespace detail

}  // namespace refreekv::inline v0
