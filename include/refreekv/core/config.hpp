// SPDX-License-Identifier: Apache-2.0
// The basis of every header: the C++20 check, the integer types and the host/device marker.
#pragma once

#include <cstdint>

#if defined(_MSVC_LANG) ? _MSVC_LANG < 202002L : __cplusplus < 202002L
#error \
    "refreekv needs C++20: compile with -std=c++20 (nvcc: -std=c++20, CMake 3.25 does not pass it)"
#endif

/// Marks functions that the CPU and CUDA backends share. Empty for a host compiler.
#if defined(__CUDACC__)
#define REFREEKV_HOST_DEVICE __host__ __device__
#else
#define REFREEKV_HOST_DEVICE
#endif

#if defined(__GNUC__)
#define REFREEKV_ALWAYS_INLINE __attribute__((always_inline)) inline
#else
#define REFREEKV_ALWAYS_INLINE inline
#endif

/// Marks arithmetic that backends share. It is always inlined: of a copy for each instruction set
/// the linker would keep one, and their results may differ in the last bit.
#define REFREEKV_SHARED REFREEKV_HOST_DEVICE REFREEKV_ALWAYS_INLINE

/// Before a loop of shared arithmetic that costs a device too many registers if it is unrolled.
#if defined(__CUDACC__)
#define REFREEKV_NO_UNROLL _Pragma("unroll 1")
#else
#define REFREEKV_NO_UNROLL
#endif

namespace refreekv::inline v0 {

/// A count, extent, stride or offset, in elements. 64 bits, so that no cache is too large.
using index_t = std::int64_t;

/// A stored position or length, in tokens. 32 bits, as engines store them.
using position_t = std::int32_t;

/// An option that counts tokens or layers. It is unsigned, so that a negative constant in braces
/// (`{.window = -1}`) does not compile. The upper limit `max_count` catches a negative value that
/// wrapped around at run time.
using count_t = std::uint32_t;
inline constexpr count_t max_count = 0x7fffffff;

/// The tokens [begin, end).
struct token_range {
  index_t begin;
  index_t end;
};

}  // namespace refreekv::inline v0
