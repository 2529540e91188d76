// SPDX-License-Identifier: Apache-2.0
// How much of a device a kernel takes whose work is known only there.
#pragma once

#include "refreekv/cuda/block.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Rows of work that are cut in equal parts, a block each, which steps over what there is of its
/// row: what is launched depends on extents alone, and engines have capacities that are far above
/// the lengths.
struct row_parts {
  index_t rows;
  index_t parts;  ///< of a row

  /// Parts for a whole device, however few rows there are, and no more than that, as each one costs
  /// the same where there is little to do. `most`: parts that a row can be cut into.
  [[nodiscard]] static constexpr row_parts of(index_t rows, index_t most) noexcept {
    return with_least(rows, 1, most);
  }

  /// The same for chunks of keys, each of which is work for a block for 10 us: where there are rows
  /// for a whole device, too, a block that has many of them ends late, and one that has none costs
  /// 3 ns of the device. (a model of an H100, not measured)
  [[nodiscard]] static constexpr row_parts of_chunks(index_t rows, index_t chunks) noexcept {
    return with_least(rows, 32, chunks);
  }

  [[nodiscard]] constexpr index_t items() const noexcept { return rows * parts; }

 private:
  [[nodiscard]] static constexpr row_parts with_least(index_t rows, index_t least,
                                                      index_t most) noexcept {
    constexpr index_t device_blocks = 2048;
    const index_t filling = rows > 0 ? device_blocks / rows : 0;
    const index_t parts = filling > least ? filling : least;
    return {rows, parts < most ? parts : most};
  }
};

}  // namespace refreekv::inline v0::cuda_detail
