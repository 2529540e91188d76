// SPDX-License-Identifier: Apache-2.0
// Which blocks of a pool are free, and how many owners each of the others has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace paged {

using block_id = std::int32_t;

class block_manager {
 public:
  explicit block_manager(std::size_t blocks);

  std::size_t blocks() const { return owners_.size(); }
  std::size_t free_blocks() const { return free_.size(); }
  std::size_t owners(block_id block) const { return owners_.at(index(block)); }

  // `count` blocks with one owner each: all of them or, where fewer are free, none.
  std::optional<std::vector<block_id>> allocate(std::size_t count);

  // One owner more, of a block that has some.
  void share(block_id block);

  // One owner less; the last one frees the block. Both throw std::logic_error where nobody owns it.
  void release(block_id block);

 private:
  static std::size_t index(block_id block) { return static_cast<std::size_t>(block); }
  std::size_t& owned(block_id block);

  std::vector<std::size_t> owners_;  // [block]; 0 for a free one
  std::vector<block_id> free_;       // the last one goes first
};

}  // namespace paged
