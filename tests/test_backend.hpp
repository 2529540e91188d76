// SPDX-License-Identifier: Apache-2.0
// The backend that a test runs on: the same sources test the CPU's and the device's, the latter
// emulated or, compiled by nvcc, on a device.
#pragma once

#if defined(__CUDACC__)
#include "cuda/device/pinned_backend.cuh"
#elif defined(REFREEKV_TEST_EMULATED)
#include "cuda/emulated_backend.hpp"
#else
#include "refreekv/cpu/backend.hpp"
#endif

#if defined(__CUDACC__)

/// A device divides the work as it likes: every run is another order.
template <int parts>
pinned_backend divided() {
  return {};
}

inline constexpr bool exhaustive = false;
constexpr unsigned affordable(unsigned count) { return count; }

#elif defined(REFREEKV_TEST_EMULATED)

/// With 1 part blocks and threads run in order, otherwise in one that the number decides.
template <int parts>
emulation::emulated_backend divided() {
  return {parts == 1 ? 0u : unsigned{parts}};
}

/// Whether there is time for every combination of what a test varies, or for each by itself.
inline constexpr bool exhaustive = false;

/// How many random problems there is time for, of `count` on the CPU.
constexpr unsigned affordable(unsigned count) { return (count + 1) / 2; }

#else

/// As many threads as parts. One type for all: half of what there is to compile.
template <int parts>
refreekv::cpu_backend<refreekv::thread_pool&> divided() {
  static refreekv::thread_pool pool(parts);
  return {pool};
}

inline constexpr bool exhaustive = true;
constexpr unsigned affordable(unsigned count) {
#if defined(REFREEKV_TEST_FEWER)  // a sanitizer's build: others run all of them
  return (count + 3) / 4;
#else
  return count;
#endif
}

#endif
