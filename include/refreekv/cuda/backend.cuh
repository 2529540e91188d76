// SPDX-License-Identifier: Apache-2.0
// The CUDA backend: `cuda_backend{stream}`, and how it launches kernels.
#pragma once

#include "refreekv/cuda/device/sort.cuh"
#include "refreekv/cuda/ops.hpp"

namespace refreekv::inline v0 {

/// A CUDA stream on which the work runs: `cuda_backend{stream}`.
/// Calls only enqueue work: they return before it is done and never synchronise. The kernels that
/// are launched do not depend on sequence lengths, so calls may be captured into a CUDA graph.
/// Requires one call outside of a capture first, because code is loaded then.
/// Errors: a refused launch returns status::device_error, and cudaGetLastError has the reason. An
/// error inside a kernel appears where the engine synchronises the stream. attention_ranked, the
/// policy that sorts, also returns device_error while an earlier CUDA error is unread.
/// Elements are float, __half, __nv_bfloat16 and their raw bits. Keys may also be scaled_keys of
/// int8 or __nv_fp8_e4m3, block_keys and int4_keys. Pointers need the alignment of their element
/// only; rows aligned to 16 bytes are read faster.
template <int... Architectures>
struct cuda_backend_for {
  cudaStream_t stream = nullptr;
};
/// A distinct type for each list of architectures that nvcc compiles for. Otherwise the dynamic
/// linker could merge functions of two shared libraries that are built for different devices.
/// Between files compiled for different architectures, pass the stream instead.
#if defined(__CUDA_ARCH_LIST__)
using cuda_backend = cuda_backend_for<__CUDA_ARCH_LIST__>;
#else
using cuda_backend = cuda_backend_for<>;
#endif

namespace cuda_detail {

/// Launches run_body on the stream and returns without waiting.
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
/// A template, so that CUB's kernels are compiled only where tokens are ranked.
template <class Key>
[[nodiscard]] REFREEKV_HIDDEN status sort_segments(const cuda_backend& exec,
                                                   const key_segments& segments, Key*& keys,
                                                   Key*& spare, const index_t* lengths,
                                                   std::byte* temporary,
                                                   std::size_t bytes) noexcept {
  // After its first launch CUB would report an earlier unread error as its own.
  if (cudaPeekAtLastError() != cudaSuccess) return status::device_error;
  return sort_on_stream(exec.stream, segments, keys, spare, lengths, temporary, bytes) ==
                 cudaSuccess
             ? status::ok
             : status::device_error;
}

}  // namespace cuda_detail

// Found by argument-dependent lookup through the backend. sort_bytes and sort_segments, which
// ranked_scan.hpp calls too, are found through key_segments in cuda_detail.
[[nodiscard]] constexpr bool sorts_together(const cuda_backend&, index_t count,
                                            index_t capacity) noexcept {
  return cuda_detail::sort_together(count, capacity);
}

template <>
struct ops<cuda_backend> : cuda_detail::device_ops<cuda_backend, device_memory> {};
static_assert(backend<cuda_backend>);

}  // namespace refreekv::inline v0
