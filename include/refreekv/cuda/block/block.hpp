// SPDX-License-Identifier: Apache-2.0
// The operations that a kernel body may use of the threads that run it.
//
// Bodies are written once, as templates over thread_block. CUDA runs them on the device; tests run
// them on the CPU with an emulated block. Only the block types themselves know which.
#pragma once

#include <concepts>
#include <limits>
#include <type_traits>

#include "refreekv/core/config.hpp"
#include "refreekv/core/status.hpp"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "refreekv's kernels copy to shared memory while they compute: compile for sm_80 or later"
#endif

/// Marks functions that run inside a kernel. They are inlined, so arrays that are passed on stay in
/// registers.
#if defined(__CUDACC__)
#define REFREEKV_DEVICE __device__ __forceinline__
#define REFREEKV_UNROLL _Pragma("unroll")
#else
#define REFREEKV_DEVICE inline
#define REFREEKV_UNROLL
#endif

namespace refreekv::inline v0::cuda_detail {

inline constexpr int warp_threads = 32;
inline constexpr int block_threads = 256;
inline constexpr int block_warps = block_threads / warp_threads;

// Constants, because device code may not call std::numeric_limits.
inline constexpr float infinity = std::numeric_limits<float>::infinity();
inline constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

/// 16 bytes, the most that one load moves.
struct alignas(16) vector16 {
  std::uint32_t words[4];
};

/// Returns p, known to point to global memory. The compiler cannot know this of a pointer that was
/// stored in shared memory, and would check it at each access.
template <class T>
[[nodiscard]] REFREEKV_DEVICE T* in_global(T* p) noexcept {
#if defined(__CUDA_ARCH__)
  return static_cast<T*>(__cvta_global_to_generic(reinterpret_cast<std::size_t>(p)));
#else
  return p;
#endif
}

struct plus {
  template <class T>
  REFREEKV_DEVICE T operator()(T a, T b) const noexcept {
    return a + b;
  }
};
/// Returns the larger value. Ignores NaN, unless it is the first argument.
struct larger {
  template <class T>
  REFREEKV_DEVICE T operator()(T a, T b) const noexcept {
    return b > a ? b : a;
  }
};

/// Returns the smaller (larger) value; NaN if either is NaN.
struct smaller_or_nan {
  template <class T>
  REFREEKV_DEVICE T operator()(T low, T x) const noexcept {
    return x < low || x != x ? x : low;
  }
};
struct larger_or_nan {
  template <class T>
  REFREEKV_DEVICE T operator()(T high, T x) const noexcept {
    return x > high || x != x ? x : high;
  }
};

/// One of block_threads threads that run the same body and share memory. All threads of the block
/// call `sync` and `sync_and` in the same order. All threads of a warp do so with the functions
/// that begin with `warp_` or `tile_`.
/// - `rank()`: returns the thread's number in the block, from 0.
/// - `sync()`: waits for all threads of the block. Afterwards each sees what any of them wrote
///   before, to shared or global memory. Nothing else orders memory between threads.
/// - `sync_and(b)`: syncs, and returns whether b holds for all threads.
/// - `copy_async<n>(to, from)`: copies n = 4, 8 or 16 bytes, aligned to n, from global to shared
///   memory. `commit()` closes a group of the thread's copies. `wait<n>()` returns when all groups
///   but the n latest have arrived, for this thread to read.
/// - `tile_reduce_scatter<lanes>(x, op)`: reduces x[N] over `lanes` neighbouring threads. Lane p of
///   them returns the reduction of x[p / (lanes / N)]. lanes and N are powers of two, N <= lanes.
///   Overwrites x.
/// - `warp_reduce(x, op)`: returns the reduction of the warp's values, to all of its threads.
/// - `warp_prefix_sum(x)`, `warp_suffix_sum(x)`: returns the sum up to, or from, the thread's own
///   value, which is included.
/// - `warp_broadcast(x, lane)`: returns that lane's x.
/// - `add(to, x)`: adds x to an unsigned in shared memory; atomic, in any order.
template <class B>
concept thread_block = requires(B& block, bool all, float x, double y, unsigned& counter,
                                float (&some)[4], void* to, const void* from) {
  { block.rank() } -> std::same_as<int>;
  block.sync();
  { block.sync_and(all) } -> std::same_as<bool>;
  block.template copy_async<4>(to, from);
  block.template copy_async<8>(to, from);
  block.template copy_async<16>(to, from);
  block.commit();
  block.template wait<1>();
  { block.template tile_reduce_scatter<16>(some, plus{}) } -> std::same_as<float>;
  { block.warp_reduce(x, larger{}) } -> std::same_as<float>;
  { block.warp_prefix_sum(y) } -> std::same_as<double>;
  { block.warp_suffix_sum(y) } -> std::same_as<double>;
  { block.warp_broadcast(y, 0) } -> std::same_as<double>;
  block.add(counter, 1u);
};

/// warp_of: the number of a thread's warp. lane_of: the thread's place in it.
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE int warp_of(const Block& block) noexcept {
  return block.rank() / warp_threads;
}
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE int lane_of(const Block& block) noexcept {
  return block.rank() % warp_threads;
}

/// One value of each warp, in shared memory, for the other warps to read.
template <class T>
struct warp_values {
  T of[block_warps];
};

/// Returns the reduction of the block's values, in the order of its warps, to all threads.
/// Synchronises the block.
template <class T, class Op, thread_block Block>
[[nodiscard]] REFREEKV_DEVICE T block_reduce(Block& block, warp_values<T>& shared, T x,
                                             Op op) noexcept {
  x = block.warp_reduce(x, op);
  if (lane_of(block) == 0) shared.of[warp_of(block)] = x;
  block.sync();
  x = shared.of[0];
  REFREEKV_UNROLL
  for (int w = 1; w < block_warps; ++w) x = op(x, shared.of[w]);
  block.sync();
  return x;
}

/// The sum up to (or from) a thread's value, and the sum of the whole block.
template <class T>
struct block_sums {
  T own;
  T all;
};

/// Returns the sum of the values up to each thread's own, included. Synchronises the block.
template <class T, thread_block Block>
[[nodiscard]] REFREEKV_DEVICE block_sums<T> block_prefix_sum(Block& block, warp_values<T>& shared,
                                                             T x) noexcept {
  x = block.warp_prefix_sum(x);
  if (lane_of(block) == warp_threads - 1) shared.of[warp_of(block)] = x;
  block.sync();
  T before{}, all{};
  REFREEKV_UNROLL
  for (int w = 0; w < block_warps; ++w) {
    if (w == warp_of(block)) before = all;
    all += shared.of[w];
  }
  block.sync();
  return {before + x, all};
}

/// Returns the sum of the values from each thread's own on, included. Synchronises the block.
template <class T, thread_block Block>
[[nodiscard]] REFREEKV_DEVICE block_sums<T> block_suffix_sum(Block& block, warp_values<T>& shared,
                                                             T x) noexcept {
  x = block.warp_suffix_sum(x);
  if (lane_of(block) == 0) shared.of[warp_of(block)] = x;
  block.sync();
  T after{}, all{};
  REFREEKV_UNROLL
  for (int w = block_warps - 1; w >= 0; --w) {
    if (w == warp_of(block)) after = all;
    all += shared.of[w];
  }
  block.sync();
  return {after + x, all};
}

/// The body of a kernel: a trivially copyable object with a type `shared`, the block's shared
/// memory, and a template operator()(block, shared, item). It is called once for each item, in no
/// particular order, with `shared` uninitialised. Blocks do not see each other's work. A backend
/// provides `run_blocks(exec, items, body)`, which starts it and returns a status.
template <class Body>
concept kernel_body = std::is_trivially_copyable_v<Body> && requires { typename Body::shared; };

/// Calls f(i) for each i in [0, count), one thread per i.
template <class F>
struct for_each_body {
  struct shared {};
  index_t count;
  F f;

  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t i = item * block_threads + block.rank();
    if (i < count) f(i);
  }
};

/// Returns the number of blocks that `count` elements need, with one thread per element.
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t blocks_for(index_t count) noexcept {
  return (count + block_threads - 1) / block_threads;
}

}  // namespace refreekv::inline v0::cuda_detail
