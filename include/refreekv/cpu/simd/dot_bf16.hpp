// SPDX-License-Identifier: Apache-2.0
// Dot products of bfloat16 queries and keys with AVX512_BF16, without widening.
#pragma once

#include "refreekv/cpu/simd/dot.hpp"

#if defined(REFREEKV_VECTOR_LANES) && defined(__AVX512BF16__)
#include <immintrin.h>

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// The product of two bfloat16 is exact in float. The instruction treats denormals as zero.
template <bfloat16_element Query, bfloat16_element Key>
struct product<Query, Key> {
  using packed = std::uint16_t;
  using query_lanes = __m512bh;
  using key_lanes = __m512bh;

  static constexpr index_t dims = index_t{2} * lane_count;

  static constexpr index_t place(index_t d) noexcept { return d; }
  static packed pack(Query x) noexcept { return std::bit_cast<std::uint16_t>(x); }

  REFREEKV_ALWAYS_INLINE static query_lanes load_query(const packed* query) noexcept {
    auto q = std::bit_cast<__m512bh>(_mm512_loadu_si512(query));
    keep(q);
    return q;
  }
  REFREEKV_ALWAYS_INLINE static key_lanes load_key(const Key* key) noexcept {
    return std::bit_cast<__m512bh>(_mm512_loadu_si512(key));
  }
  REFREEKV_ALWAYS_INLINE static void multiply_add(lanes& sum, query_lanes q, key_lanes k) noexcept {
    sum = std::bit_cast<lanes>(_mm512_dpbf16_ps(std::bit_cast<__m512>(sum), q, k));
  }
};

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET

#endif
