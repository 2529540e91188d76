// SPDX-License-Identifier: Apache-2.0
// Keeps a rounding step that compiler flags may remove.
#pragma once

#include <type_traits>

#include "refreekv/core/config.hpp"

namespace refreekv::inline v0::detail {

/// Returns x, rounded and hidden from the compiler. Flags that allow reassociation, such as
/// -funsafe-math-optimizations, would otherwise merge the operations before and after, and x87
/// would not round. GCC reports when these flags are on. When they are off, x is not hidden from
/// GCC, which saves 5 % of a scan. T: a float, a double, or a vector of them.
template <class T>
[[nodiscard]] REFREEKV_SHARED T exactly(T x) noexcept {
#if defined(__CUDA_ARCH__)
#elif defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__ASSOCIATIVE_MATH__) && !defined(__i386__)
#elif defined(__x86_64__) && defined(__GNUC__)
  if constexpr (std::is_class_v<T>) {
    asm("" : "+m"(x));
  } else {
    asm("" : "+v"(x));
  }
#elif defined(__aarch64__) && defined(__GNUC__)
  if constexpr (std::is_class_v<T>) {
    asm("" : "+m"(x));
  } else {
    asm("" : "+w"(x));
  }
#elif defined(__GNUC__)
  asm("" : "+m"(x));
#endif
  return x;
}

}  // namespace refreekv::inline v0::detail
