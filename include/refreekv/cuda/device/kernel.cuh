// SPDX-License-Identifier: Apache-2.0
// The thread block of a CUDA kernel, and the only kernel: run_body.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "refreekv/cuda/block/block.hpp"

/// Hides kernels and their launchers from the dynamic linker. Two shared libraries that are
/// compiled for different devices have their own, and the linker must not merge them.
#if defined(_WIN32)
#define REFREEKV_HIDDEN
#else
#define REFREEKV_HIDDEN __attribute__((visibility("hidden")))
#endif

namespace refreekv::inline v0::cuda_detail {

/// thread_block on a device: threads exchange values by warp shuffles.
struct cuda_block {
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ bool sync_and(bool all) const { return __syncthreads_and(all) != 0; }

  template <int Bytes>
  __device__ __forceinline__ void copy_async(void* to, const void* from) const {
    const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (Bytes == 16) {  // bypasses the L1 cache
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(Bytes)
                   : "memory");
    }
  }
  __device__ __forceinline__ void commit() const {
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  template <int Latest>
  __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(Latest) : "memory");
  }

  /// Costs N - 1 + log2(Lanes / N) shuffles; reducing each value alone costs N log2(Lanes).
  template <int Lanes, class T, std::size_t N, class Op>
  __device__ __forceinline__ T tile_reduce_scatter(T (&x)[N], Op op) const {
    if constexpr (N == 1) {
#pragma unroll
      for (int m = Lanes / 2; m > 0; m /= 2) x[0] = op(x[0], __shfl_xor_sync(all_lanes, x[0], m));
      return x[0];
    } else {
      constexpr std::size_t half = N / 2;
      const bool upper = (rank() & (Lanes / 2)) != 0;
      T own[half];
#pragma unroll
      for (std::size_t i = 0; i < half; ++i) {
        const T give = upper ? x[i] : x[i + half];
        const T keep = upper ? x[i + half] : x[i];
        own[i] = op(keep, __shfl_xor_sync(all_lanes, give, Lanes / 2));
      }
      return tile_reduce_scatter<Lanes / 2>(own, op);
    }
  }
  template <class T, class Op>
  __device__ __forceinline__ T warp_reduce(T x, Op op) const {
    T own[1] = {x};
    return tile_reduce_scatter<warp_threads>(own, op);
  }
  template <class T>
  __device__ __forceinline__ T warp_prefix_sum(T x) const {
#pragma unroll
    for (int d = 1; d < warp_threads; d *= 2) {
      const T before = __shfl_up_sync(all_lanes, x, d);
      if (lane_of(*this) >= d) x = before + x;
    }
    return x;
  }
  template <class T>
  __device__ __forceinline__ T warp_suffix_sum(T x) const {
#pragma unroll
    for (int d = 1; d < warp_threads; d *= 2) {
      const T after = __shfl_down_sync(all_lanes, x, d);
      if (lane_of(*this) + d < warp_threads) x = x + after;
    }
    return x;
  }
  template <class T>
  __device__ __forceinline__ T warp_broadcast(T x, int lane) const {
    return __shfl_sync(all_lanes, x, lane);
  }

  __device__ __forceinline__ void add(unsigned& to, unsigned x) const { atomicAdd(&to, x); }

 private:
  static constexpr unsigned all_lanes = 0xffffffff;
};
static_assert(thread_block<cuda_block>);

/// The minimum number of blocks that share a multiprocessor. Their number limits the registers of a
/// thread. A body may define its own.
template <class Body>
inline constexpr int resident_blocks = 2;
template <class Body>
  requires requires { Body::resident_blocks; }
inline constexpr int resident_blocks<Body> = Body::resident_blocks;

/// Shared memory of a multiprocessor, in bytes. Each block occupies 1 KB more than its own.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
inline constexpr int shared_bytes = 228 << 10;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
inline constexpr int shared_bytes = 164 << 10;
#else
inline constexpr int shared_bytes = 100 << 10;
#endif
/// resident_blocks, limited to what fits in shared memory. More would cost registers without ever
/// running together.
template <class Body>
inline constexpr int blocks_with_room = (std::min)(
    resident_blocks<Body>, shared_bytes / (int{sizeof(typename Body::shared)} + (1 << 10)));

template <kernel_body Body>
REFREEKV_HIDDEN __global__ void __launch_bounds__(block_threads, blocks_with_room<Body>)
    run_body(const __grid_constant__ Body body, const index_t items) {
  __shared__ typename Body::shared shared;
  cuda_block block;
  for (index_t item = blockIdx.x; item < items; item += gridDim.x) {
    body(block, shared, item);
    block.sync();
  }
}

}  // namespace refreekv::inline v0::cuda_detail
