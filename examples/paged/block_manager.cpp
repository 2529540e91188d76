// SPDX-License-Identifier: Apache-2.0
#include "block_manager.hpp"

#include <limits>
#include <stdexcept>
#include <string>

namespace paged {

block_manager::block_manager(std::size_t blocks) : owners_(blocks) {
  if (blocks > std::size_t{std::numeric_limits<block_id>::max()}) {
    throw std::invalid_argument("a pool may have 2^31 - 1 blocks at most");
  }
  for (std::size_t block = blocks; block-- > 0;) free_.push_back(static_cast<block_id>(block));
}

std::optional<std::vector<block_id>> block_manager::allocate(std::size_t count) {
  if (count > free_.size()) return std::nullopt;
  const auto first = free_.end() - static_cast<std::ptrdiff_t>(count);
  const std::vector<block_id> blocks(free_.rbegin(), std::make_reverse_iterator(first));
  free_.erase(first, free_.end());
  for (const block_id block : blocks) owners_[index(block)] = 1;
  return blocks;
}

void block_manager::share(block_id block) { ++owned(block); }

void block_manager::release(block_id block) {
  if (--owned(block) == 0) free_.push_back(block);
}

std::size_t& block_manager::owned(block_id block) {
  if (block < 0 || index(block) >= owners_.size() || owners_[index(block)] == 0) {
    throw std::logic_error("block " + std::to_string(block) + " has no owner");
  }
  return owners_[index(block)];
}

}  // namespace paged
