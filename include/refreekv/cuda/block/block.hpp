// SPDX-License-Identifier: Apache-2.0
// What a kernel body may ask of the threads that run it.
//
// Bodies are written once, as templates over thread_block: CUDA runs them on the device, tests run
// them on the CPU with an emulated block. Few lines know which it is.
#pragma once

#include <concepts>
#include <limits>
#include <type_traits>

#include "refreekv/core/config.hpp"
#include "refreekv/core/status.hpp"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "refreekv's kernels copy to shared memory while they compute: compile for sm_80 or later"
#endif

/// Marks what runs inside a kernel. It is inlined: arrays that are passed on stay in registers.
#if defined(__CUDACC__)
#define REFREEKV_DEVICE __device__ __forceinline__
#define REFREEKV_UNROLL _Pragma("unroll")
#define REFREEKV_NO_UNROLL _Pragma("unroll 1")
#else
#define REFREEKV_DEVICE inline
#define REFREEKV_UNROLL
#define REFREEKV_NO_UNROLL
#endif

namespace refreekv::inline v0::cuda_detail {

inline constexpr int warp_threads = 32;
inline constexpr int block_threads = 256;
inline constexpr int block_warps = block_threads / warp_threads;

// Constants, as device code may not call std::numeric_limits.
inline constexpr float infinity = std::numeric_limits<float>::infinity();
inline constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

/// 16 bytes, the most that one load moves.
struct alignas(16) vector16 {
  std::uint32_t words[4];
};

/// The same pointer, which is known to point to global memory: of one that has been in shared
/// memory the compiler does not know, and would have each access look.
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
/// NaN is never the larger one, unless it comes first.
struct larger {
  template <class T>
  REFREEKV_DEVICE T operator()(T a, T b) const noexcept {
    return b > a ? b : a;
  }
};

/// NaN where either is.
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

/// One of block_threads threads that run the same body, with memory that they share. All threads of
/// a block, or of a warp where the name says so, make the same calls in the same order.
/// - `rank()`: of the thread, from 0.
/// - `sync()`: what any thread of the block wrote before, to shared or global memory, all see
///   after. Nothing else orders memory between threads.
/// - `sync_and(b)`: the same, and whether b holds for all threads.
/// - `copy_async<n>(to, from)`: 4, 8 or 16 bytes, aligned so, from global to shared memory;
///   `commit()` closes a group of a thread's copies, `wait<n>()` returns when all but its n latest
///   groups are there, for that thread to read.
/// - `tile_reduce_scatter<lanes>(x, op)`: of N values in each of `lanes` neighbouring threads, lane
///   p of them gets the reduction of x[p / (lanes / N)]. lanes and N are powers of two, N <= lanes.
///   x is used up.
/// - `warp_reduce(x, op)`: of the warp's values, to all of its threads.
/// - `warp_prefix_sum(x)`, `warp_suffix_sum(x)`: the sum of the values up to, or from, the thread's
///   own on.
/// - `warp_broadcast(x, lane)`: that lane's value.
/// - `add(to, x)`: to += x in shared memory, whole and in any order; of unsigned.
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

/// A thread's warp, and its place in it.
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE int warp_of(const Block& block) noexcept {
  return block.rank() / warp_threads;
}
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE int lane_of(const Block& block) noexcept {
  return block.rank() % warp_threads;
}

/// What warps leave each other, in shared memory.
template <class T>
struct warp_values {
  T of[block_warps];
};

/// The reduction of the block's values, in the order of its warps, to all threads.
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

/// A thread's sum, and that of the whole block.
template <class T>
struct block_sums {
  T own;
  T all;
};

/// Sums of the values up to each thread's own.
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

/// Sums of the values from each thread's own on.
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

/// What a kernel runs: a trivially copyable object with a type `shared` of what its block shares,
/// and a template operator()(block, shared, item). It is called once for each item, with `shared`
/// uninitialised and in no particular order; blocks do not see each other.
/// `run_blocks(on, items, body)`, which a backend provides, starts it and returns a status.
template <class Body>
concept kernel_body = std::is_trivially_copyable_v<Body> && requires { typename Body::shared; };

/// Calls f(i) for i in [0, count), a thread each.
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

/// Items that take `count` elements, one a thread.
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t blocks_for(index_t count) noexcept {
  return (count + block_threads - 1) / block_threads;
}

}  // namespace refreekv::inline v0::cuda_detail
