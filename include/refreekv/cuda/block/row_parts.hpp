// SPDX-License-Identifier: Apache-2.0
// Cuts rows of work into parts, so that few rows fill a device.
#pragma once

#include "refreekv/cuda/block/block.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Rows of work that are cut into equal parts, with one block each. A block loops over what its row
/// contains. So launches depend on extents only, although an engine's capacities are far above the
/// lengths.
struct row_parts {
  index_t rows;
  index_t parts;  ///< parts of each row

  /// Returns enough parts to fill a device, however few rows there are. It returns no more than
  /// that, because each part has a fixed cost even with little to do. `most`: the most parts that a
  /// row can be cut into.
  [[nodiscard]] static constexpr row_parts of(index_t rows, index_t most,
                                              index_t device_blocks = 2048,
                                              index_t least = 1) noexcept {
    const index_t filling = rows > 0 ? device_blocks / rows : 0;
    const index_t parts = filling > least ? filling : least;
    return {rows, parts < most ? parts : most};
  }

  /// As `of`, but for chunks of keys, with at least 32 parts. A block reads a chunk in 10 us, so a
  /// block with many chunks finishes late even where the rows fill the device. A block without
  /// chunks costs the device 3 ns. (a model of an H100, not confirmed on a device)
  [[nodiscard]] static constexpr row_parts of_chunks(index_t rows, index_t chunks) noexcept {
    return of(rows, chunks, 2048, 32);
  }

  [[nodiscard]] constexpr index_t items() const noexcept { return rows * parts; }
};

/// Cuts rows of values whose lengths are known on the device only, for work in steps. Each step is
/// a launch, since blocks of a row do not see each other's results within one launch.
struct row_cut {
  static constexpr index_t read_at_once = 2048;  ///< values, by one block: see tile_values
  static constexpr index_t most_parts = 32;      ///< each block sums the results of all parts

  /// The most parts of a row, at most block_threads; 1: one block processes the whole row.
  index_t parts;
  index_t part_least = read_at_once;  ///< at least so many values in each part but the last

  /// Chooses the parts by a model that is not confirmed on a device. A block reads 2,048 values in
  /// 1 us, which is the latency of its loads. 512 such blocks reach a device's bandwidth, and a
  /// launch costs 3.5 us. A step over parts costs one more launch, and saves the other parts' share
  /// of reading the row.
  [[nodiscard]] static constexpr row_cut of(index_t rows, index_t capacity,
                                            index_t most = most_parts) noexcept {
    constexpr double launch = 3.5;
    const index_t reads = (capacity + read_at_once - 1) / read_at_once;
    const index_t parts = row_parts::of(rows, reads < most ? reads : most, 512).parts;
    const auto whole = static_cast<double>(reads);
    return {parts > 1 && launch + whole / static_cast<double>(parts) < whole ? parts : 1};
  }

  /// Returns the values [begin, end) of a part; empty if the row is too short for it.
  [[nodiscard]] REFREEKV_DEVICE token_range part(index_t index, index_t count) const noexcept {
    const index_t width = width_of(count), begin = index * width, end = begin + width;
    return {begin < count ? begin : count, end < count ? end : count};
  }
  /// Returns how many parts have values; at least 1.
  [[nodiscard]] REFREEKV_DEVICE index_t used(index_t count) const noexcept {
    return count > 0 ? divided(count - 1, width_of(count)) + 1 : 1;
  }

 private:
  [[nodiscard]] REFREEKV_DEVICE index_t width_of(index_t count) const noexcept {
    return divided(divided(count + parts - 1, parts) + part_least - 1, part_least) * part_least;
  }
  /// Positions, and sums of two, fit in 32 bits, which devices divide faster than 64.
  [[nodiscard]] REFREEKV_DEVICE static index_t divided(index_t a, index_t b) noexcept {
    return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  }
};

}  // namespace refreekv::inline v0::cuda_detail
