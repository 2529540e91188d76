// SPDX-License-Identifier: Apache-2.0
// The median of times: what a noisy machine's measurements are summed up by.
#pragma once

#include <algorithm>
#include <vector>

namespace bench {

/// Requires at least one time; reorders them.
inline double median(std::vector<double>& times) {
  const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

}  // namespace bench
