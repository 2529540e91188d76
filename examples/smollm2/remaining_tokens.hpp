// SPDX-License-Identifier: Apache-2.0
// Which tokens of the text a layer still has, one pruning after the other: a text is addressed by
// position, a pruned cache by slot.
#pragma once

#include <cstddef>
#include <refreekv/refreekv.hpp>
#include <vector>

namespace smollm2 {

class remaining_tokens {
 public:
  explicit remaining_tokens(std::size_t kv_heads) : positions_(kv_heads) {}

  std::size_t length(std::size_t kv_head) const { return positions_[kv_head].size(); }

  // Every head's next slots hold the text's next tokens.
  void append(std::size_t tokens);

  // A head's slots [kept.sinks, kept.cut) go.
  void drop(std::size_t kv_head, const refreekv::kept_range& kept);

  // The slots of what a head has left of the text's [begin, end).
  refreekv::token_range slots_of(std::size_t kv_head, const refreekv::token_range& text) const;

 private:
  std::vector<std::vector<refreekv::position_t>> positions_;  // [kv_head] of [slot], ascending
  refreekv::position_t next_ = 0;
};

}  // namespace smollm2
