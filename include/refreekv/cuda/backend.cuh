// SPDX-License-Identifier: Apache-2.0
// The CUDA backend.
#pragma once

#include "refreekv/cuda/device/sort.cuh"
#include "refreekv/cuda/ops.hpp"

namespace refreekv::inline v0 {

/// Where the device's work runs: `cuda_backend{stream}`. Calls return before it is done, launch the
/// same kernels whatever the lengths are, and may be captured into a graph (after a first call
/// outside of one, as code is loaded then). Nothing waits for the device, so an error inside a
/// kernel shows where the engine waits for the stream; a launch that is refused comes back as
/// status::device_error, and cudaGetLastError tells why. A policy that sorts, attention_ranked, is
/// refused where an earlier error waits to be read, too.
/// Elements are float, __half, __nv_bfloat16 and their raw bits; keys may be scaled_keys of int8 or
/// __nv_fp8_e4m3. Pointers to them need no alignment but their own: 16 bytes make rows fast.
template <int... Architectures>
struct cuda_backend_for {
  cudaStream_t stream = nullptr;
};
/// Another type for each list of architectures that nvcc compiles for: of two shared libraries that
/// are built for different devices the dynamic linker must not take one's functions for the
/// other's. Between files that are compiled for different ones, pass the stream.
#if defined(__CUDA_ARCH_LIST__)
using cuda_backend = cuda_backend_for<__CUDA_ARCH_LIST__>;
#else
using cuda_backend = cuda_backend_for<>;
#endif

namespace cuda_detail {

/// Starts run_body, and does not wait for it.
template <kernel_body Body>
[[nodiscard]] REFREEKV_HIDDEN status run_blocks(const cuda_backend& exec, index_t items,
                                                const Body& body) noexcept {
  if (items == 0) return status::ok;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(items < max_count ? items : index_t{max_count}));
  config.blockDim = dim3(block_threads);
  config.stream = exec.stream;
  return cudaLaunchKernelEx(&config, run_body<Body>, body, items) == cudaSuccess
             ? status::ok
             : status::device_error;
}

[[nodiscard]] constexpr std::size_t sort_bytes(const cuda_backend&,
                                               const key_segments& segments) noexcept {
  return sort_bytes_of(segments);
}
/// A template, so that only who ranks tokens compiles CUB's kernels.
template <class Key>
[[nodiscard]] REFREEKV_HIDDEN status sort_segments(const cuda_backend& exec,
                                                   const key_segments& segments, Key*& keys,
                                                   Key*& spare, const index_t* lengths,
                                                   std::byte* temporary,
                                                   std::size_t bytes) noexcept {
  // CUB takes any error that waits to be read for one of its own, after its first launch.
  if (cudaPeekAtLastError() != cudaSuccess) return status::device_error;
  return sort_on_stream(exec.stream, segments, keys, spare, lengths, temporary, bytes) ==
                 cudaSuccess
             ? status::ok
             : status::device_error;
}

}  // namespace cuda_detail

// ranked_scan.hpp finds it by the backend, and what else it asks of CUB by the segments.
[[nodiscard]] constexpr bool sorts_together(const cuda_backend&, index_t count,
                                            index_t capacity) noexcept {
  return cuda_detail::sort_together(count, capacity);
}

template <>
struct ops<cuda_backend> : cuda_detail::device_ops<cuda_backend, device_memory> {};
static_assert(backend<cuda_backend>);

}  // namespace refreekv::inline v0
