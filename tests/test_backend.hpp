// SPDX-License-Identifier: Apache-2.0
// The backend that a test runs on. One set of sources tests the CPU backend, the emulated CUDA
// backend and, compiled by nvcc, the CUDA backend on a device.
#pragma once

#if defined(__CUDACC__)
#include "cuda/device/pinned_backend.cuh"
#elif defined(REFREEKV_TEST_EMULATED)
#include "cuda/emulated_backend.hpp"
#else
#include "refreekv/cpu/backend.hpp"
#endif

#if defined(__CUDACC__)

/// A device schedules blocks itself, so each run may have another order; `parts` has no effect.
template <int parts>
pinned_backend divided() {
  return {};
}

inline constexpr bool exhaustive = false;
constexpr unsigned affordable(unsigned count) { return count; }

#elif defined(REFREEKV_TEST_EMULATED)

/// With 1 part, blocks and threads run in order. Otherwise `parts` seeds their order.
template <int parts>
emulation::emulated_backend divided() {
  return {parts == 1 ? 0u : unsigned{parts}};
}

/// Whether a test has time for all combinations of its parameters, or varies one at a time.
inline constexpr bool exhaustive = false;

/// How many random problems a test has time for, where it has `count` on the CPU.
constexpr unsigned affordable(unsigned count) { return (count + 1) / 2; }

#else

/// A backend with `parts` threads. All have one type, which halves the code to compile.
template <int parts>
refreekv::cpu_backend<refreekv::thread_pool&> divided() {
  static refreekv::thread_pool pool(parts);
  return {pool};
}

inline constexpr bool exhaustive = true;
constexpr unsigned affordable(unsigned count) {
#if defined(REFREEKV_TEST_FEWER)  // a sanitizer's build; other builds run all
  return (count + 3) / 4;
#else
  return count;
#endif
}

#endif
