// SPDX-License-Identifier: Apache-2.0
// A vector register of floats: the type that the CPU's hot loops are written in.
#pragma once

#include <Eigen/Core>
#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

#include "refreekv/core/exactly.hpp"
#include "refreekv/cpu/simd/target.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

using detail::exactly;

/// Floats in a vector register, and the number of vector registers.
#if defined(__AVX512F__)
inline constexpr int lane_count = 16, lane_registers = 32;
#elif defined(__AVX__)
inline constexpr int lane_count = 8, lane_registers = 16;
#elif defined(__aarch64__)
inline constexpr int lane_count = 4, lane_registers = 32;
#else
inline constexpr int lane_count = 4, lane_registers = 16;
#endif

// GCC and clang have vector types in the language. Eigen provides the same operators for other
// compilers, for processors without vectors, and with REFREEKV_EIGEN_LANES.
#if defined(__GNUC__) && !defined(REFREEKV_EIGEN_LANES) && !(defined(__i386__) && !defined(__SSE__))
#define REFREEKV_VECTOR_LANES 1

using lanes = float __attribute__((vector_size(lane_count * 4)));
using lane_bits = std::uint32_t __attribute__((vector_size(lane_count * 4)));
/// A register of doubles.
using wide_lanes = double __attribute__((vector_size(lane_count * 4)));

REFREEKV_ALWAYS_INLINE lanes splat(float x) noexcept { return x - lanes{}; }

/// Returns the larger of each pair; x where the two do not compare.
REFREEKV_ALWAYS_INLINE lanes larger(lanes x, lanes y) noexcept { return x < y ? y : x; }

/// Returns value, and 0 where x is below `least`.
REFREEKV_ALWAYS_INLINE lanes zero_below(lanes x, lanes least, lanes value) noexcept {
  return x < least ? lanes{} : value;
}

/// Returns 2^(a - b) where that is a normal number, and otherwise any value, without a trap.
/// Requires whole numbers to which integer_shift was added.
REFREEKV_ALWAYS_INLINE lanes two_to_the_difference(lanes a, lanes b) noexcept {
  return std::bit_cast<lanes>((std::bit_cast<lane_bits>(a) - std::bit_cast<lane_bits>(b) + 127u)
                              << 23);
}

template <std::size_t... i, class Index>
REFREEKV_ALWAYS_INLINE lanes shuffle_lanes(lanes a, lanes b, Index index,
                                           std::index_sequence<i...>) noexcept {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index(int{i})...);
#else
  using lane_ints = std::int32_t __attribute__((vector_size(lane_count * 4)));
  return __builtin_shuffle(a, b, lane_ints{index(int{i})...});
#endif
}

/// Returns lanes of a and b in any order: lane i is lane index(i) of a followed by b.
template <class Index>
REFREEKV_ALWAYS_INLINE lanes shuffle(lanes a, lanes b, Index index) noexcept {
  return shuffle_lanes(a, b, index, std::make_index_sequence<lane_count>());
}

#else

using lanes = Eigen::Array<float, lane_count, 1>;
using wide_lanes = Eigen::Array<double, lane_count / 2, 1>;

REFREEKV_ALWAYS_INLINE lanes splat(float x) noexcept { return lanes::Constant(x); }

REFREEKV_ALWAYS_INLINE lanes larger(const lanes& x, const lanes& y) noexcept {
  return (x < y).select(y, x);
}

REFREEKV_ALWAYS_INLINE lanes zero_below(const lanes& x, const lanes& least,
                                        const lanes& value) noexcept {
  return (x < least).select(0.0f, value);
}

REFREEKV_ALWAYS_INLINE lanes two_to_the_difference(const lanes& a, const lanes& b) noexcept {
  lanes power;
  for (int i = 0; i < lane_count; ++i) {
    const auto difference = std::bit_cast<std::uint32_t>(a[i]) - std::bit_cast<std::uint32_t>(b[i]);
    power[i] = std::bit_cast<float>((difference + 127u) << 23);
  }
  return power;
}

template <class Index>
REFREEKV_ALWAYS_INLINE lanes shuffle(const lanes& a, const lanes& b, Index index) noexcept {
  lanes out;
  for (int i = 0; i < lane_count; ++i) {
    out[i] = index(i) < lane_count ? a[index(i)] : b[index(i) - lane_count];
  }
  return out;
}

#endif

/// Adding this to a number below 2^22 rounds it to an integer, which then fills the lowest bits.
inline constexpr float integer_shift = 12582912;  // 1.5 * 2^23

REFREEKV_ALWAYS_INLINE lanes load(const float* data) noexcept {
  lanes x;
  std::memcpy(static_cast<void*>(&x), data, sizeof x);
  return x;
}
REFREEKV_ALWAYS_INLINE void store(const lanes& x, float* data) noexcept {
  std::memcpy(data, &x, sizeof x);
}

/// Loads lane_count / 2 floats as doubles. Eigen 3.4 does not vectorise this cast.
REFREEKV_ALWAYS_INLINE wide_lanes load_wide(const float* data) noexcept {
#if defined(REFREEKV_VECTOR_LANES)
  using half_lanes = float __attribute__((vector_size(lane_count * 2)));
  half_lanes x;
  std::memcpy(&x, data, sizeof x);
  return __builtin_convertvector(x, wide_lanes);
#else
  return Eigen::Map<const Eigen::Array<float, lane_count / 2, 1> >(data).cast<double>();
#endif
}
REFREEKV_ALWAYS_INLINE wide_lanes load_wide(const double* data) noexcept {
  wide_lanes x;
  std::memcpy(static_cast<void*>(&x), data, sizeof x);
  return x;
}
REFREEKV_ALWAYS_INLINE void store(const wide_lanes& x, double* data) noexcept {
  std::memcpy(data, &x, sizeof x);
}

/// Makes the compiler keep x in a register. GCC would otherwise read it from memory at each use.
template <class Register>
REFREEKV_ALWAYS_INLINE void keep([[maybe_unused]] Register& x) noexcept {
#if defined(REFREEKV_VECTOR_LANES) && defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(REFREEKV_VECTOR_LANES) && defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

/// Prefetches the cache line at `address` into the second-level cache.
REFREEKV_ALWAYS_INLINE void prefetch([[maybe_unused]] const void* address) noexcept {
#if defined(__GNUC__)
  __builtin_prefetch(address, 0, 2);
#endif
}

/// Folds all lanes in a tree.
template <class Fold>
REFREEKV_ALWAYS_INLINE float across(lanes x, Fold fold) noexcept {
  if constexpr (lane_count == 16) x = fold(x, shuffle(x, x, [](int i) { return i ^ 8; }));
  if constexpr (lane_count >= 8) x = fold(x, shuffle(x, x, [](int i) { return i ^ 4; }));
  x = fold(x, shuffle(x, x, [](int i) { return i ^ 2; }));
  x = fold(x, shuffle(x, x, [](int i) { return i ^ 1; }));
  return x[0];
}
REFREEKV_ALWAYS_INLINE float sum_of(const lanes& x) noexcept {
  return across(x, [](const lanes& a, const lanes& b) -> lanes { return a + b; });
}
REFREEKV_ALWAYS_INLINE float largest_of(const lanes& x) noexcept {
  return across(x, [](const lanes& a, const lanes& b) { return larger(a, b); });
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
