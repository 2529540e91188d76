// SPDX-License-Identifier: Apache-2.0
// Loops of a block over the values of one head, and selection in token order.
#pragma once

#include "refreekv/cuda/block/block.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The values of one head: [token].
struct value_row {
  const float* values;
  index_t stride;

  [[nodiscard]] REFREEKV_DEVICE float operator()(index_t t) const noexcept {
    return values[t * stride];
  }
  /// Returns the row from token t on.
  [[nodiscard]] REFREEKV_DEVICE value_row from(index_t t) const noexcept {
    return {values + t * stride, stride};
  }
};

/// Calls f(value) for each of the row's first `count` values. A block that reads a row alone is
/// latency-bound, so loads are issued in batches. O(count / threads)
template <thread_block Block, class F>
REFREEKV_DEVICE void for_each_value(const Block& block, const value_row& row, index_t count,
                                    const F& f) noexcept {
  constexpr int batch = 8;
  for (index_t first = block.rank(); first < count; first += batch * block_threads) {
    float values[batch];
    REFREEKV_UNROLL
    for (int i = 0; i < batch; ++i) {
      const index_t t = first + i * block_threads;
      values[i] = t < count ? row(t) : 0;
    }
    REFREEKV_UNROLL
    for (int i = 0; i < batch; ++i) {
      if (first + i * block_threads < count) f(values[i]);
    }
  }
}

/// Whether any of the row's first `count` values is NaN. O(count / threads)
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE bool any_nan(Block& block, const value_row& row,
                                           index_t count) noexcept {
  bool ordered = true;
  for_each_value(block, row, count, [&](float v) { ordered = ordered && v == v; });
  return !block.sync_and(ordered);
}

/// Values of a tile, which are summed at once. A row's sum is the sum of its tiles; thread i adds
/// tiles i, i + block_threads and so on. So its bits do not depend on which blocks summed the
/// tiles.
inline constexpr index_t tile_values = 8 * block_threads;

[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tiles_of(index_t count) noexcept {
  return (count + tile_values - 1) / tile_values;
}

/// Returns the sum of a tile of the row's first `count` values, to all threads.
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE double sum_of_tile(Block& block, warp_values<double>& shared,
                                                 const value_row& row, index_t count,
                                                 index_t tile) noexcept {
  const index_t begin = tile * tile_values, left = count - begin;
  double sum = 0;
  for_each_value(block, row.from(begin), left < tile_values ? left : tile_values,
                 [&](float v) { sum += double{v}; });
  return block_reduce(block, shared, sum, plus{});
}

/// Returns the sum of the row's first `count` values, to all threads. O(count / threads)
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE double sum_of_values(Block& block, warp_values<double>& shared,
                                                   const value_row& row, index_t count) noexcept {
  double sum = 0;
  for (index_t tile = 0; tile < tiles_of(count); ++tile) {
    const double of_tile = sum_of_tile(block, shared, row, count, tile);
    if (tile % block_threads == block.rank()) sum += of_tile;
  }
  return block_reduce(block, shared, sum, plus{});
}

/// As sum_of_values, but from the sums of the row's tiles.
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE double sum_of_tiles(Block& block, warp_values<double>& shared,
                                                  const double* tiles, index_t count) noexcept {
  double sum = 0;
  for (index_t tile = block.rank(); tile < tiles_of(count); tile += block_threads) {
    sum += tiles[tile];
  }
  return block_reduce(block, shared, sum, plus{});
}

/// Calls f(i, t) for each token t of [0, tokens) for which holds(t). i counts these tokens from 0,
/// in ascending order. Returns their number. O(tokens / threads)
template <thread_block Block, class Predicate, class F>
REFREEKV_DEVICE index_t for_each_selected(Block& block, warp_values<std::uint64_t>& shared,
                                          index_t tokens, const Predicate& holds,
                                          const F& f) noexcept {
  // One prefix sum counts four batches of 256 tokens, in 16 bits each.
  constexpr int parts = 4;
  index_t count = 0;
  for (index_t first = 0; first < tokens; first += parts * block_threads) {
    std::uint64_t flags = 0;
    REFREEKV_UNROLL
    for (int part = 0; part < parts; ++part) {
      const index_t t = first + part * block_threads + block.rank();
      const bool held = t < tokens && holds(t);
      flags |= std::uint64_t{held} << 16 * part;
    }
    const auto sums = block_prefix_sum(block, shared, flags);
    REFREEKV_UNROLL
    for (int part = 0; part < parts; ++part) {
      const auto own = static_cast<index_t>(sums.own >> 16 * part & 0xffff);
      const index_t t = first + part * block_threads + block.rank();
      if ((flags >> 16 * part & 1) != 0) f(count + own - 1, t);
      count += static_cast<index_t>(sums.all >> 16 * part & 0xffff);
    }
  }
  return count;
}

}  // namespace refreekv::inline v0::cuda_detail
