// SPDX-License-Identifier: Apache-2.0
// The memory of all pages. A page holds the keys and values of one layer for a few tokens, so any
// layer of any sequence can use it.
#pragma once

#include <algorithm>
#include <refreekv/cache/layouts.hpp>
#include <span>

#include "block_manager.hpp"
#include "pages.hpp"

namespace paged {

struct page_shape {
  std::size_t tokens;
  std::size_t kv_heads;
  std::size_t head_dim;

  std::size_t pages_for(std::size_t count) const { return (count + tokens - 1) / tokens; }
  std::size_t bytes() const { return 2 * tokens * kv_heads * head_dim * sizeof(float); }
};

class page_pool {
 public:
  page_pool(const page_shape& shape, std::size_t pages)
      : manager(pages), shape_(shape), memory_(smollm2::map_zeroed(pages * shape.bytes())) {}

  block_manager manager;

  const page_shape& shape() const { return shape_; }
  std::size_t bytes() const { return manager.blocks() * shape_.bytes(); }

  // The pages that a table lists: [page][2][kv_head][token][head_dim] in memory, as FlashInfer's.
  auto rows(const refreekv::page_table<block_id>& table) const {
    return refreekv::layouts::flashinfer_hnd(
        reinterpret_cast<float*>(memory_.bytes().data()),
        {.pages = static_cast<refreekv::index_t>(manager.blocks()),
         .page_tokens = static_cast<refreekv::index_t>(shape_.tokens),
         .kv_heads = static_cast<refreekv::index_t>(shape_.kv_heads),
         .head_dim = static_cast<refreekv::index_t>(shape_.head_dim)},
        table);
  }

  void copy(block_id from, block_id to) {
    const std::span<const std::byte> source = bytes_of(from);
    std::copy(source.begin(), source.end(), memory_.bytes().subspan(first_byte(to)).begin());
  }

  // Of one page.
  std::span<const std::byte> bytes_of(block_id page) const {
    return memory_.bytes().subspan(first_byte(page), shape_.bytes());
  }

 private:
  std::size_t first_byte(block_id page) const {
    return static_cast<std::size_t>(page) * shape_.bytes();
  }

  page_shape shape_;
  smollm2::pages memory_;
};

}  // namespace paged
