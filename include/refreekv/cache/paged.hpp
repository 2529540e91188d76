// SPDX-License-Identifier: Apache-2.0
// A source in pages, found through a page table: the keys or the values of one layer.
#pragma once

#include "refreekv/cache/aliasing.hpp"

namespace refreekv::inline v0 {

/// The pages of each sequence, oldest first. Page ids are int32 or int64.
template <class Index, class Memory = host_memory>
class page_table {
 public:
  using memory = Memory;

  /// ids: [sequence, page], padded at the end. lengths: [sequence], in tokens. (vLLM)
  [[nodiscard]] static constexpr page_table padded(view<const Index, 2, Memory> ids,
                                                   lengths_view<Memory> lengths) noexcept {
    page_table t;
    t.ids_ = ids;
    t.lengths_ = lengths;
    t.max_pages_ = ids.extent(1);
    return t;
  }

  /// ids: [page of all sequences]. offsets: [sequence + 1], into ids. last_page_tokens: [sequence],
  /// in 1..page_tokens, ignored if a sequence has no page. max_pages: an upper bound of the pages
  /// of any sequence. (FlashInfer)
  [[nodiscard]] static constexpr page_table ragged(view<const Index, 1, Memory> ids,
                                                   view<const Index, 1, Memory> offsets,
                                                   lengths_view<Memory> last_page_tokens,
                                                   index_t max_pages) noexcept {
    page_table t;
    t.ids_ = {ids.data(), {1, ids.extent(0)}, {0, ids.stride(0)}};
    t.offsets_ = offsets;
    t.ragged_ = true;
    t.lengths_ = last_page_tokens;
    t.max_pages_ = max_pages;
    return t;
  }

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t sequences() const noexcept {
    return lengths_.extent(0);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t max_pages() const noexcept {
    return max_pages_;
  }

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence,
                                                              index_t page_tokens) const noexcept {
    if (!ragged_) return index_t{lengths_(sequence)};
    const index_t pages = offsets_(sequence + 1) - offsets_(sequence);
    return pages == 0 ? 0 : (pages - 1) * page_tokens + lengths_(sequence);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t id(index_t sequence,
                                                          index_t page) const noexcept {
    return ragged_ ? index_t{ids_(0, offsets_(sequence) + page)} : index_t{ids_(sequence, page)};
  }
  /// Null, or the error in words. `pages` is the number of pages of the pool. O(pages in use).
  [[nodiscard]] constexpr const char* invalid(index_t page_tokens, index_t pages) const noexcept {
    if (max_pages_ < 0 || max_pages_ > max_count / page_tokens) {
      return "a sequence may have 2^31 - 1 tokens at most";
    }
    if (ids_.malformed() || lengths_.malformed() || offsets_.malformed())
      return "page table without a pointer";
    if (ragged_ ? offsets_.extent(0) != sequences() + 1 : ids_.extent(0) != sequences()) {
      return "page table and lengths differ in sequences";
    }
    if constexpr (std::same_as<Memory, host_memory>) {
      for (index_t s = 0; s < sequences(); ++s) {
        if (ragged_) {
          const index_t first = offsets_(s), last = offsets_(s + 1);
          if (first < 0 || first > last || last > ids_.extent(1)) return "page offsets must ascend";
          if (last - first > max_pages_) return "a sequence has more pages than max_pages";
          if (last > first && (lengths_(s) < 1 || lengths_(s) > page_tokens)) {
            return "last_page_tokens is outside [1, page_tokens]";
          }
        } else if (lengths_(s) < 0 || lengths_(s) > max_pages_ * page_tokens) {
          return "a length is outside [0, pages * page_tokens]";
        }
        const index_t used = (tokens(s, page_tokens) + page_tokens - 1) / page_tokens;
        for (index_t p = 0; p < used; ++p) {
          if (id(s, p) < 0 || id(s, p) >= pages) return "a page id is outside the pool";
        }
      }
    }
    return nullptr;
  }

 private:
  view<const Index, 2, Memory> ids_;  // [sequence, page], or [1, page] with offsets
  view<const Index, 1, Memory> offsets_;
  lengths_view<Memory> lengths_;  // tokens, or tokens on the last page with offsets
  index_t max_pages_ = 0;
  bool ragged_ = false;
};

/// Pages of `page_tokens` tokens, found through a page table. The pool is one strided tensor, or
/// one pointer for each page. With pointers, the view `page` holds the shape and the strides of one
/// page.
template <class T, class Index = std::int32_t, class Memory = host_memory>
class paged {
 public:
  using element_type = T;
  using memory = Memory;

  /// pool: [page, kv_head, slot, head_dim], axes in any order in memory. NHD, HND, and the K and V
  /// of a page side by side or packed in one row are all strides.
  constexpr paged(view<T, 4, Memory> pool, page_table<Index, Memory> table) noexcept
      : page_(pool.data(), {pool.extent(1), pool.extent(2), pool.extent(3)},
              {pool.stride(1), pool.stride(2), pool.stride(3)}),
        pages_(pool.extent(0)),
        page_stride_(pool.stride(0)),
        table_(table) {}

  /// pointers: [page]. Requires a pointer for every page in use. page: [kv_head, slot, head_dim];
  /// its own pointer is not used.
  constexpr paged(view<T* const, 1, Memory> pointers, view<T, 3, Memory> page,
                  page_table<Index, Memory> table) noexcept
      : page_(page), pointers_(pointers), pages_(pointers.extent(0)), table_(table) {}

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr cache_shape shape() const noexcept {
    return {table_.sequences(), page_.extent(0), table_.max_pages() * page_.extent(1),
            page_.extent(2)};
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t page_tokens() const noexcept {
    return page_.extent(1);
  }

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    return at_most(shape().capacity, table_.tokens(sequence, page_.extent(1)));
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_run<T> run_at(index_t sequence,
                                                                   index_t kv_head,
                                                                   index_t token) const noexcept {
    const index_t page_tokens = page_.extent(1);
    const index_t slot = token % page_tokens;
    const index_t id = table_.id(sequence, token / page_tokens);
    T* page = pointers_.data() == nullptr ? page_.data() + id * page_stride_ : pointers_(id);
    const index_t on_page = page_tokens - slot;
    const index_t left = tokens(sequence) - token;
    return {page + kv_head * page_.stride(0) + slot * page_.stride(1),
            on_page < left ? on_page : left, page_.stride(1), page_.stride(2)};
  }
  /// The first row of the pool; null with a pointer for each page. Needs no lengths or tables,
  /// which may be in device memory.
  [[nodiscard]] constexpr token_run<T> first_slot_row() const noexcept {
    T* first = pointers_.data() == nullptr ? page_.data() : nullptr;
    return {first, 0, page_.stride(1), page_.stride(2)};
  }
  /// Whether all KV heads are the same memory.
  [[nodiscard]] constexpr bool repeats_heads() const noexcept {
    return page_.extent(0) > 1 && page_.stride(0) == 0;
  }
  /// Null, or the error that a written page is listed more than once: see page_written_twice.
  template <class Written>
  [[nodiscard]] constexpr const char* written_twice(const Written& written) const noexcept {
    return detail::page_written_twice([&](const auto& f) { for_each_page(written, f); });
  }

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (page_tokens() < 1) return "a page must hold at least one token";
    if (page_.extent(0) < 0 || page_.extent(2) < 0 || pages_ < 0)
      return "page extents must be >= 0";
    if (pages_ > 0 && page_.data() == nullptr && pointers_.data() == nullptr) {
      return "a page pool needs a pointer";
    }
    return table_.invalid(page_tokens(), pages_);
  }

 private:
  /// Calls f(id, whether any head writes to it) for each page in use.
  template <class Written, class F>
  constexpr void for_each_page(const Written& written, const F& f) const noexcept {
    for (index_t s = 0; s < table_.sequences(); ++s) {
      token_range range{0, 0};
      for (index_t h = 0; h < page_.extent(0); ++h) {
        const token_range own = written(s, h);
        if (own.begin == own.end) continue;
        const bool first = range.begin == range.end;
        range.begin = first || own.begin < range.begin ? own.begin : range.begin;
        range.end = first || own.end > range.end ? own.end : range.end;
      }
      const index_t used = (tokens(s) + page_tokens() - 1) / page_tokens();
      for (index_t p = 0; p < used; ++p) {
        f(table_.id(s, p), p * page_tokens() < range.end && (p + 1) * page_tokens() > range.begin);
      }
    }
  }

  view<T, 3, Memory> page_;  // [kv_head, slot, head_dim]
  view<T* const, 1, Memory> pointers_;
  index_t pages_ = 0;
  index_t page_stride_ = 0;
  page_table<Index, Memory> table_;
};

}  // namespace refreekv::inline v0
