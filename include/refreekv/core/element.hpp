// SPDX-License-Identifier: Apache-2.0
// The element types that C++ has no name for, and how all backends read their bits.
#pragma once

#include <cstring>

#include "refreekv/core/config.hpp"

namespace refreekv::inline v0 {

/// A 16-bit float as raw bits, for engines that have no type for it.
/// `reinterpret_cast<bf16_bits*>(p)` of a uint16_t* states what the bits mean.
struct bf16_bits {
  std::uint16_t bits;
};
struct f16_bits {
  std::uint16_t bits;
};
/// An 8-bit float: 4 bits of exponent, 3 bits of mantissa, no infinity. (OCP fp8)
struct fp8_e4m3_bits {
  std::uint8_t bits;
};

namespace detail {

/// Returns the float of these bits.
[[nodiscard]] REFREEKV_SHARED float as_float(std::uint32_t bits) noexcept {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
/// Returns the bits of a float.
[[nodiscard]] REFREEKV_SHARED std::uint32_t as_bits(float x) noexcept {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

/// Returns the bfloat16 of these 16 bits as a float; exact, also for NaN and Inf.
[[nodiscard]] REFREEKV_SHARED float bf16_value(std::uint32_t bits) noexcept {
  return as_float(bits << 16);
}

/// Returns a half as a float. Exact, also for NaN and Inf, unless the processor treats denormals as
/// zero. low, high: words with the half in their low, or high, 16 bits; the others are ignored.
/// Floats and Bits are float and uint32_t, or vectors of them.
template <class Floats, class Bits>
[[nodiscard]] REFREEKV_SHARED Floats widened_half(const Bits& low, const Bits& high) noexcept {
  static_assert(sizeof(Floats) == sizeof(Bits));
  const Bits magnitude = low << 13 & 0x0fffe000u;
  Floats x;
  std::memcpy(&x, &magnitude, sizeof x);
  x *= 0x1p112f;  // from half's exponent bias to float's; makes subnormals normal
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  // Halves are below 2^16, so what is not are Inf and NaN.
  bits |= (x >= 0x1p16f ? Bits{} + 0x7f800000u : Bits{}) | (high & 0x80000000u);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
[[nodiscard]] REFREEKV_SHARED float half_value(std::uint32_t bits) noexcept {
  return widened_half<float>(bits, bits << 16);
}

/// Returns a component of a 4-bit key, without the centre: see int4_keys. code: a whole number in
/// [0, 15].
[[nodiscard]] REFREEKV_SHARED float int4_value(float code, float low, float step) noexcept {
  return code * step + low;
}

}  // namespace detail

}  // namespace refreekv::inline v0
