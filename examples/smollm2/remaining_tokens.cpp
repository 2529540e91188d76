// SPDX-License-Identifier: Apache-2.0
#include "remaining_tokens.hpp"

#include <algorithm>

namespace smollm2 {

void remaining_tokens::append(std::size_t tokens) {
  for (std::size_t i = 0; i < tokens; ++i, ++next_) {
    for (auto& head : positions_) head.push_back(next_);
  }
}

void remaining_tokens::drop(std::size_t kv_head, const refreekv::kept_range& kept) {
  auto& head = positions_[kv_head];
  head.erase(head.begin() + kept.sinks, head.begin() + kept.cut);
}

refreekv::token_range remaining_tokens::slots_of(std::size_t kv_head,
                                                 const refreekv::token_range& text) const {
  const auto& head = positions_[kv_head];
  const auto slot = [&](refreekv::index_t position) {
    return std::lower_bound(head.begin(), head.end(), position) - head.begin();
  };
  return {slot(text.begin), slot(text.end)};
}

}  // namespace smollm2
