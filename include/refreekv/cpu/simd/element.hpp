// SPDX-License-Identifier: Apache-2.0
// The element types of a cache on the CPU, and their conversions to and from float.
#pragma once

#include <algorithm>
#include <bit>
#include <type_traits>

#include "refreekv/core/element.hpp"
#include "refreekv/cpu/simd/lanes.hpp"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

template <class T>
concept half_element = std::is_same_v<T, Eigen::half> || std::is_same_v<T, f16_bits>;
template <class T>
concept bfloat16_element = std::is_same_v<T, Eigen::bfloat16> || std::is_same_v<T, bf16_bits>;
template <class T>
concept element = std::is_same_v<T, float> || half_element<T> || bfloat16_element<T>;

/// Returns x as a float; exact, as half_value is. Eigen 3.4 does not vectorise its casts from half.
template <element T>
[[nodiscard]] inline float widen(T x) noexcept {
  if constexpr (bfloat16_element<T>) {
    return detail::bf16_value(std::bit_cast<std::uint16_t>(x));
  } else if constexpr (half_element<T>) {
    return detail::half_value(std::bit_cast<std::uint16_t>(x));
  } else {
    return x;
  }
}

/// The elements of 8-bit keys.
template <class T>
concept small_element = std::is_same_v<T, std::int8_t> || std::is_same_v<T, fp8_e4m3_bits>;

[[nodiscard]] inline float widen(std::int8_t x) noexcept { return x; }
/// Without a branch, so that compilers vectorise it, and without a denormal, which would be slow.
[[nodiscard]] inline float widen(fp8_e4m3_bits x) noexcept {
  const std::uint32_t magnitude = x.bits & 0x7fu, sign = (x.bits & 0x80u) << 24;
  const float normal = detail::as_float((magnitude << 20) + (120u << 23));
  const float subnormal = detail::as_float((magnitude << 20) + (121u << 23)) - 0x1p-6f;
  const std::uint32_t bits = detail::as_bits(magnitude < 8 ? subnormal : normal);
  return detail::as_float((magnitude == 0x7fu ? 0x7fc00000u : bits) | sign);
}

/// Returns the value of T nearest to x. Saturates at the largest finite value.
template <element T>
[[nodiscard]] inline T narrow(float x) noexcept {
  if constexpr (bfloat16_element<T>) {
    constexpr float most = 0x1.fep127f;
    return std::bit_cast<T>(Eigen::bfloat16((std::min)((std::max)(x, -most), most)));
  } else if constexpr (half_element<T>) {
    constexpr float most = 65504;
    return std::bit_cast<T>(Eigen::half((std::min)((std::max)(x, -most), most)));
  } else {
    return x;
  }
}

/// Loads `lane_count` elements from any address.
template <element T>
  requires(!std::is_same_v<T, float>)
REFREEKV_ALWAYS_INLINE lanes load(const T* data) noexcept {
#if defined(REFREEKV_VECTOR_LANES)
  if constexpr (half_element<T>) {
#if defined(__F16C__) && defined(__AVX512F__)
    return std::bit_cast<lanes>(_mm512_cvtph_ps(
        _mm256_loadu_si256(static_cast<const __m256i*>(static_cast<const void*>(data)))));
#elif defined(__F16C__) && defined(__AVX__)
    return std::bit_cast<lanes>(_mm256_cvtph_ps(
        _mm_loadu_si128(static_cast<const __m128i*>(static_cast<const void*>(data)))));
#elif defined(__SSE2__) && !defined(__AVX__)
    // The loop below would widen halves one by one: at -O2 compilers do not vectorise it.
    const __m128i bits =
        _mm_loadl_epi64(static_cast<const __m128i*>(static_cast<const void*>(data)));
    const auto twice = std::bit_cast<lane_bits>(_mm_unpacklo_epi16(bits, bits));
    return detail::widened_half<lanes>(twice, twice);
#endif
  }
#endif
  float out[lane_count];
  for (int i = 0; i < lane_count; ++i) out[i] = widen(data[i]);
  return load(out);
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
