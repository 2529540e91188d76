// SPDX-License-Identifier: Apache-2.0
// The state of the search for a ranking's limits: the score at the last place of each size.
#pragma once

#include "refreekv/backend/importance.hpp"
#include "refreekv/cuda/block/block.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The search for the limits of one ranking: the leading bits of the score at each size's last
/// place. Scores are >= 0, so their bits order as they do.
struct limit_search {
  static constexpr int digit_bits = 7;  // bits that one step finds
  static constexpr int bins = 1 << digit_bits;

  bool decides;  ///< whether there is anything to rank
  // For size i + 1: begins has the leading bits of its last score, before and after a step,
  // alternating. Among scores with these bits, `left` come before it; in the end `equals` equal it.
  std::uint32_t begins[2][max_sizes];
  index_t left[max_sizes];
  index_t equals[max_sizes];
};
/// Groups of sizes whose last scores share their leading bits, numbered from large to small.
struct limit_groups {
  std::uint32_t begins[max_sizes];
  int of[max_sizes];  ///< group of size i + 1
  warp_values<int> counts;

  /// Returns the number of groups. Synchronises the block at the end.
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
    return {0, 31 - limit_search::digit_bits, limit_search::digit_bits};  // no sign bit
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool is_last() const noexcept { return shift == 0; }
  /// before: which of a search's `begins` the step reads. after: which one it writes.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr int before() const noexcept { return number % 2; }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr int after() const noexcept { return 1 - number % 2; }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr search_digit next() const noexcept {
    const int low = shift - limit_search::digit_bits;
    return low < 0 ? search_digit{number + 1, 0, shift}
                   : search_digit{number + 1, low, limit_search::digit_bits};
  }
};

/// The buffers of the search for limits.
struct limit_parts {
  limit_search* searches;  ///< [sequence, ranking]
  /// [sequence, kv_head, split, sizes, bins]: for each group, how many scores of a split that share
  /// the group's leading bits have which next digit. A split is a part of a head's tokens.
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
