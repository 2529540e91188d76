// SPDX-License-Identifier: Apache-2.0
// The element types of a cache on a device, and their conversion to float, 16 bytes at a time.
#pragma once

#include <cstring>

#include "refreekv/core/element.hpp"
#include "refreekv/cuda/block/block.hpp"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#endif

namespace refreekv::inline v0::cuda_detail {

/// The meaning of an element's bits: float, f16_bits, bf16_bits, fp8_e4m3_bits or int8. An engine's
/// own type for one of them specialises this.
template <class T>
struct stored_as {
  using type = T;
};
#if defined(__CUDACC__)
template <>
struct stored_as<__half> {
  using type = f16_bits;
};
template <>
struct stored_as<__nv_bfloat16> {
  using type = bf16_bits;
};
template <>
struct stored_as<__nv_fp8_e4m3> {
  using type = fp8_e4m3_bits;
};
#endif
template <class T>
using stored = typename stored_as<std::remove_const_t<T>>::type;

template <class T>
concept element =
    std::is_same_v<stored<T>, float> || std::is_same_v<stored<T>, f16_bits> ||
    std::is_same_v<stored<T>, bf16_bits> || std::is_same_v<stored<T>, fp8_e4m3_bits> ||
    std::is_same_v<stored<T>, std::int8_t>;

/// The number of elements in 16 bytes.
template <element T>
inline constexpr int fragment_elements = 16 / int{sizeof(T)};

using detail::as_bits;
using detail::as_float;

/// As half_value; devices have an instruction for it.
[[nodiscard]] REFREEKV_DEVICE float widen_half(std::uint32_t bits) noexcept {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#else
  return detail::half_value(bits);
#endif
}

/// Returns an e4m3 value, whose sign and magnitude are shifted to those of a half. As a half it is
/// 2^8 too small, and finite where e4m3 has NaN.
[[nodiscard]] REFREEKV_DEVICE float widen_fp8(std::uint32_t as_half) noexcept {
  const float x = widen_half(as_half & 0xffffu) * 256;
  return x == 480 || x == -480 ? not_a_number : x;
}

/// Returns x as a float; exact, including NaN and Inf.
template <element T>
[[nodiscard]] REFREEKV_DEVICE float widen(T x) noexcept {
  using type = stored<T>;
  if constexpr (std::is_same_v<type, float> || std::is_same_v<type, std::int8_t>) {
    return static_cast<float>(x);
  } else if constexpr (sizeof(T) == 2) {
    std::uint16_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return std::is_same_v<type, bf16_bits> ? detail::bf16_value(bits) : widen_half(bits);
  } else {
    std::uint8_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return widen_fp8((bits & 0x80u) << 8 | (bits & 0x7fu) << 7);
  }
}

/// Returns x - zero, for small whole numbers: 2^23 + x has x in its lowest bits. This avoids a
/// conversion, of which devices execute few per cycle.
[[nodiscard]] REFREEKV_DEVICE float small_float(std::uint32_t x, float zero) noexcept {
  return as_float(0x4b000000u | x) - (0x1p23f + zero);
}

/// Converts 16 bytes of elements to floats.
template <element T>
REFREEKV_DEVICE void unpack(const vector16& from,
                            float (&to)[std::size_t{fragment_elements<T>}]) noexcept {
  using type = stored<T>;
  REFREEKV_UNROLL
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t word = from.words[i];
    if constexpr (std::is_same_v<type, float>) {
      to[i] = as_float(word);
    } else if constexpr (std::is_same_v<type, bf16_bits>) {
      to[2 * i] = detail::bf16_value(word);
      to[2 * i + 1] = as_float(word & 0xffff0000u);
    } else if constexpr (std::is_same_v<type, f16_bits>) {
      to[2 * i] = widen_half(word & 0xffffu);
      to[2 * i + 1] = widen_half(word >> 16);
    } else if constexpr (std::is_same_v<type, fp8_e4m3_bits>) {
      const std::uint32_t even = (word & 0x00800080u) << 8 | (word & 0x007f007fu) << 7;
      const std::uint32_t odd = (word & 0x80008000u) | (word & 0x7f007f00u) >> 1;
      to[4 * i] = widen_fp8(even);
      to[4 * i + 1] = widen_fp8(odd);
      to[4 * i + 2] = widen_fp8(even >> 16);
      to[4 * i + 3] = widen_fp8(odd >> 16);
    } else {
      const std::uint32_t shifted = word ^ 0x80808080u;
      REFREEKV_UNROLL
      for (int k = 0; k < 4; ++k) to[4 * i + k] = small_float(shifted >> 8 * k & 0xffu, 128);
    }
  }
}

}  // namespace refreekv::inline v0::cuda_detail
