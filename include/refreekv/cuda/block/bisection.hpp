// SPDX-License-Identifier: Apache-2.0
// The limit that Twilight's published kernel finds, computed by a block.
#pragma once

#include "refreekv/cuda/block/value_limit.hpp"

namespace refreekv::inline v0::cuda_detail {

struct smaller {
  template <class T>
  REFREEKV_DEVICE T operator()(T a, T b) const noexcept {
    return b < a ? b : a;
  }
};

struct bisection_memory {
  warp_values<float> values;
  warp_values<double> sums;
};

/// Returns the limit of the values that Twilight's published kernel (arXiv 2502.02770) selects: the
/// values above a threshold, which it finds by bisection from the first value. Requires values >= 0
/// with a sum of 1 / part. O(count / threads) per step of the bisection
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE value_limit limit_of_bisection(Block& block, bisection_memory& s,
                                                             const value_row& row, index_t count,
                                                             float part, float share) noexcept {
  constexpr float precision = 1e-5f;
  float low = 0, high = row(0) * part;
  for (;;) {
    const float middle = (low + high) / 2;
    float next = high, previous = low;
    double above = 0;
    for_each_value(block, row, count, [&](float x) {
      const float v = x * part;
      if (v > low && v < next) next = v;
      if (v <= high && v > previous) previous = v;
      if (v > middle) above += double{v};
    });
    next = block_reduce(block, s.values, next, smaller{});
    previous = block_reduce(block, s.values, previous, larger{});
    above = block_reduce(block, s.sums, above, plus{});
    if (above >= double{share}) {
      low = middle;
    } else {
      high = previous < middle ? previous : middle;
    }
    if (!(previous - next > precision)) break;
  }
  float least = infinity;
  for_each_value(block, row, count, [&](float x) {
    if (x * part > low && x < least) least = x;
  });
  return {block_reduce(block, s.values, least, smaller{}), count};
}

}  // namespace refreekv::inline v0::cuda_detail
