// SPDX-License-Identifier: Apache-2.0
// Byte-pair merging: which two neighbouring tokens become one, and in which order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace smollm2 {

class byte_pairs {
 public:
  // Pairs are added in order of rank: the earlier one wins wherever both apply.
  void add(int left, int right, int merged);

  // Applies the best-ranked pair, the leftmost first, until none applies: O(n log n).
  std::vector<int> merge(const std::vector<int>& tokens) const;

 private:
  struct merge_rule {
    std::size_t rank;
    int merged;
  };

  const merge_rule* find(int left, int right) const;

  std::unordered_map<std::uint64_t, merge_rule> rules_;  // key: both tokens, see key_of
};

}  // namespace smollm2
