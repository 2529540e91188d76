// SPDX-License-Identifier: Apache-2.0
// Lengths are int32, as engines' kernels have them.
// fails with: lengths are int32
#include <refreekv/cache/dense.hpp>

#ifdef REFREEKV_BAD
using length = std::int64_t;
#else
using length = std::int32_t;
#endif

auto cache(refreekv::view<float, 4> rows, refreekv::view<const length, 1> lengths) {
  return refreekv::dense(rows, lengths);
}
