// SPDX-License-Identifier: Apache-2.0
// The CUDA backend for tests of every backend: it runs the device's kernels on the host's memory.
//
// Whatever a test allocates, and its stack, is page-locked memory, which both reach at the same
// address (pinned_main.cpp), so the sources that test the CPU test the device. Each launch is
// waited for, and an error in it ends the program.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <new>

#include "../eigen_elements.hpp"
#include "refreekv/cuda/backend.cuh"

struct pinned_backend : refreekv::cuda_backend {};

namespace pinned {

inline void finish(const pinned_backend& exec) noexcept {
  if (const cudaError_t error = cudaStreamSynchronize(exec.stream); error != cudaSuccess) {
    std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
    std::abort();
  }
}

}  // namespace pinned

namespace refreekv::inline v0 {

namespace cuda_detail {

template <kernel_body Body>
[[nodiscard]] status run_blocks(const pinned_backend& exec, index_t items,
                                const Body& body) noexcept {
  const status s = run_blocks(static_cast<const cuda_backend&>(exec), items, body);
  pinned::finish(exec);
  return s;
}

}  // namespace cuda_detail

template <>
struct ops<pinned_backend> : cuda_detail::device_ops<pinned_backend, host_memory> {};

}  // namespace refreekv::inline v0
