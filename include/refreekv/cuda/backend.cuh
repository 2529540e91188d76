// SPDX-License-Identifier: Apache-2.0
// The CUDA backend.
#pragma once

#include "refreekv/cuda/kernel.cuh"
#include "refreekv/cuda/ops.hpp"
#include "refreekv/cuda/sort.cuh"

namespace refreekv::inline v0 {

/// Where the device's work runs: `cuda_backend{stream}`. Calls return before it is done, launch the
/// same kernels whatever the lengths are, and may be captured into a graph (after a first call
/// outside of one, as code is loaded then). Nothing waits for the
/// device, so an error inside a kernel shows where the engine waits for the stream; a launch that
/// is refused comes back as status::device_error, and cudaGetLastError tells why.
/// Elements are float, __half, __nv_bfloat16 and their raw bits; keys may be scaled_keys of int8 or
/// __nv_fp8_e4m3. Pointers to them need no alignment but their own: 16 bytes make rows fast.
struct cuda_backend {
  cudaStream_t stream = nullptr;
};

namespace cuda_detail {

/// Starts run_body, and does not wait for it.
template <kernel_body Body>
[[nodiscard]] status run_blocks(const cuda_backend& on, index_t items, const Body& body) noexcept {
  if (items == 0) return status::ok;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(items < max_count ? items : index_t{max_count}));
  config.blockDim = dim3(block_threads);
  config.stream = on.stream;
  return cudaLaunchKernelEx(&config, run_body<Body>, body, items) == cudaSuccess
             ? status::ok
             : status::device_error;
}

}  // namespace cuda_detail

// What ops finds by their backend: CUB's sorts.
[[nodiscard]] inline status sort_segments(const cuda_backend& on, std::uint64_t* keys,
                                          std::uint64_t* sorted, index_t segments,
                                          index_t segment_stride, const index_t* lengths,
                                          std::byte* temporary,
                                          std::size_t temporary_bytes) noexcept {
  return cuda_detail::sort_on_stream(on.stream, keys, sorted, segments, segment_stride, lengths,
                                     temporary, temporary_bytes);
}
[[nodiscard]] inline std::size_t sort_bytes(const cuda_backend&, index_t segments,
                                            index_t segment_stride) noexcept {
  return cuda_detail::sort_bytes_of(segments, segment_stride);
}

template <>
struct ops<cuda_backend> : cuda_detail::device_ops<cuda_backend, device_memory> {};
static_assert(backend<cuda_backend>);

}  // namespace refreekv::inline v0
