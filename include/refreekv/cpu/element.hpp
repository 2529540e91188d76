// SPDX-License-Identifier: Apache-2.0
// The element types of a cache on the CPU, and how they become floats.
#pragma once

#include <Eigen/Core>
#include <bit>
#include <type_traits>

#include "refreekv/view.hpp"

namespace refreekv::inline v0::cpu_detail {

template <class T>
inline constexpr bool is_f16 = std::is_same_v<T, Eigen::half> || std::is_same_v<T, f16_bits>;
template <class T>
inline constexpr bool is_bf16 = std::is_same_v<T, Eigen::bfloat16> || std::is_same_v<T, bf16_bits>;

template <class T>
concept element = std::is_same_v<T, float> || is_f16<T> || is_bf16<T>;

/// Exact, NaN and Inf included, unless the engine treats denormals as zero. Written without
/// branches and on integers: Eigen 3.4 does not vectorise its casts from half, compilers do
/// vectorise this.
template <element T>
[[nodiscard]] inline float widen(T x) noexcept {
  if constexpr (is_bf16<T>) {
    return std::bit_cast<float>(std::uint32_t{std::bit_cast<std::uint16_t>(x)} << 16);
  } else if constexpr (is_f16<T>) {
    const std::uint32_t bits = std::bit_cast<std::uint16_t>(x);
    const std::uint32_t magnitude = (bits & 0x7fffu) << 13;
    // 2^112 moves the exponent from half's bias to float's and makes subnormals normal.
    const auto finite = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
    const std::uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return std::bit_cast<float>(finite | special | (bits & 0x8000u) << 16);
  } else {
    return x;
  }
}

/// Floats of one vector register.
inline constexpr int lanes =
    EIGEN_MAX_STATIC_ALIGN_BYTES > 16 ? EIGEN_MAX_STATIC_ALIGN_BYTES / int{sizeof(float)} : 4;
using lane_array = Eigen::Array<float, lanes, 1>;

/// `lanes` elements from anywhere.
template <element T>
[[nodiscard]] inline lane_array load(const T* data) noexcept {
  if constexpr (std::is_same_v<T, float>) {
    return Eigen::Map<const lane_array>(data);
  } else {
    lane_array out;
    for (int i = 0; i < lanes; ++i) out[i] = widen(data[i]);
    return out;
  }
}

}  // namespace refreekv::inline v0::cpu_detail
