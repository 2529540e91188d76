// SPDX-License-Identifier: Apache-2.0
// How rows of work are cut in parts, so that few rows fill a device.
#pragma once

#include "refreekv/cuda/block/block.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Rows of work that are cut in equal parts, a block each, which steps over what there is of its
/// row: what is launched depends on extents alone, and engines have capacities that are far above
/// the lengths.
struct row_parts {
  index_t rows;
  index_t parts;  ///< of a row

  /// Parts for a whole device, however few rows there are, and no more than that, as each one costs
  /// the same where there is little to do. `most`: parts that a row can be cut into.
  [[nodiscard]] static constexpr row_parts of(index_t rows, index_t most,
                                              index_t device_blocks = 2048,
                                              index_t least = 1) noexcept {
    const index_t filling = rows > 0 ? device_blocks / rows : 0;
    const index_t parts = filling > least ? filling : least;
    return {rows, parts < most ? parts : most};
  }

  /// The same for chunks of keys, each of which is work for a block for 10 us: where there are rows
  /// for a whole device, too, a block that has many of them ends late, and one that has none costs
  /// 3 ns of the device. (a model of an H100 that no device has confirmed)
  [[nodiscard]] static constexpr row_parts of_chunks(index_t rows, index_t chunks) noexcept {
    return of(rows, chunks, 2048, 32);
  }

  [[nodiscard]] constexpr index_t items() const noexcept { return rows * parts; }
};

/// How the values of rows are cut whose lengths only a device knows, for work in steps: each step
/// is a launch, since parts of a row do not see each other within one.
struct row_cut {
  static constexpr index_t read_at_once = 2048;  ///< values, by a block: see tile_values
  static constexpr index_t most_parts = 32;      ///< each block sums what all parts of a row left

  /// Of a row, at most; 1: a block takes a row on its own. <= block_threads.
  index_t parts;
  index_t part_least = read_at_once;  ///< values of each part but the last

  /// By a model that no device has confirmed: a block reads 2,048 values in 1 µs, whose loads it
  /// waits for, 512 such blocks read as fast as a device can, and a launch takes 3.5 µs. A step
  /// over parts so costs a launch, and saves the share of the others in reading a row.
  [[nodiscard]] static constexpr row_cut of(index_t rows, index_t capacity,
                                            index_t most = most_parts) noexcept {
    constexpr double launch = 3.5;
    const index_t reads = (capacity + read_at_once - 1) / read_at_once;
    const index_t parts = row_parts::of(rows, reads < most ? reads : most, 512).parts;
    const auto whole = static_cast<double>(reads);
    return {parts > 1 && launch + whole / static_cast<double>(parts) < whole ? parts : 1};
  }

  /// Values [begin, end) of a part; none where the row is too short for it.
  [[nodiscard]] REFREEKV_DEVICE token_range part(index_t index, index_t count) const noexcept {
    const index_t width = width_of(count), begin = index * width, end = begin + width;
    return {begin < count ? begin : count, end < count ? end : count};
  }
  /// How many parts have values; the first one always counts.
  [[nodiscard]] REFREEKV_DEVICE index_t used(index_t count) const noexcept {
    return count > 0 ? divided(count - 1, width_of(count)) + 1 : 1;
  }

 private:
  [[nodiscard]] REFREEKV_DEVICE index_t width_of(index_t count) const noexcept {
    return divided(divided(count + parts - 1, parts) + part_least - 1, part_least) * part_least;
  }
  /// Positions and sums of two fit in 32 bits, in which devices divide faster.
  [[nodiscard]] REFREEKV_DEVICE static index_t divided(index_t a, index_t b) noexcept {
    return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  }
};

}  // namespace refreekv::inline v0::cuda_detail
