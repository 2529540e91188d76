// SPDX-License-Identifier: Apache-2.0
// What is known of the scores at the last places of a ranking's sizes while they are searched for.
#pragma once

#include "refreekv/backend/importance.hpp"
#include "refreekv/cuda/block/block.hpp"

namespace refreekv::inline v0::cuda_detail {

/// What is known of a ranking's limits: the bits that the scores at the last places of its sizes
/// begin with. Scores are >= 0, whose bits are in their order.
struct limit_search {
  static constexpr int digit_bits = 7;  // that a step finds
  static constexpr int bins = 1 << digit_bits;

  bool decides;  ///< whether there is anything to rank
  // Of the size i + 1: what its last score begins with, before a step and after it, by turns; of
  // the scores that begin so, how many come before it and, in the end, how many equal it.
  std::uint32_t begins[2][max_sizes];
  index_t left[max_sizes];
  index_t equals[max_sizes];
};
/// Sizes whose last scores begin alike, numbered from large to small.
struct limit_groups {
  std::uint32_t begins[max_sizes];
  int of[max_sizes];  ///< the group of the size i + 1
  warp_values<int> counts;

  /// Returns how many there are. The block's threads are in step afterwards.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE int find(Block& block, const std::uint32_t* of_sizes,
                                         int sizes) noexcept {
    const int i = block.rank();
    const std::uint32_t own = i < sizes ? of_sizes[i] : 0;
    const bool is_first = i < sizes && (i == 0 || of_sizes[i - 1] != own);
    const auto sums = block_prefix_sum(block, counts, is_first ? 1 : 0);
    if (i < sizes) of[i] = sums.own - 1;
    if (is_first) begins[sums.own - 1] = own;
    block.sync();
    return sums.all;
  }
};
/// The digit that a step finds.
struct search_digit {
  int number;
  int shift, bits;

  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr search_digit first() noexcept {
    return {0, 31 - limit_search::digit_bits, limit_search::digit_bits};  // there is no sign
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool is_last() const noexcept { return shift == 0; }
  /// Which of a search's `begins` it goes by; the other is what it leaves.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr int before() const noexcept { return number % 2; }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr int after() const noexcept { return 1 - number % 2; }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr search_digit next() const noexcept {
    const int low = shift - limit_search::digit_bits;
    return low < 0 ? search_digit{number + 1, 0, shift}
                   : search_digit{number + 1, low, limit_search::digit_bits};
  }
};

/// What finds the limits works in.
struct limit_parts {
  limit_search* searches;  ///< [sequence, ranking]
  /// [sequence, kv_head, split, sizes, bins]: of the scores of a split that begin as those of a
  /// group do, how many have which digit next.
  unsigned* counts;

  template <class Layer>
  [[nodiscard]] static limit_parts carve(arena& from, const importance_rule& rule,
                                         const Layer& layer, index_t splits) noexcept {
    return {from.array<limit_search>(layer.sequences(), layer.kv_heads()),
            from.array<unsigned>(layer.sequences(), layer.kv_heads(), splits, index_t{rule.sizes},
                                 index_t{limit_search::bins})};
  }
};

}  // namespace refreekv::inline v0::cuda_detail
