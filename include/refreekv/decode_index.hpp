// SPDX-License-Identifier: Apache-2.0
// Keeping what decoding reads in place of the keys up to date: 4-bit keys and bounds of pages.
#pragma once

#include "refreekv/backend.hpp"

namespace refreekv::inline v0 {

namespace detail {

/// Whether an index of [sequence, kv_head, rows, ..] has a place for all of `keys`.
template <kv_source Keys>
[[nodiscard]] constexpr bool has_place(const Keys& keys,
                                       const lengths_view<typename Keys::memory>& from,
                                       index_t sequences, index_t kv_heads, index_t rows,
                                       index_t tokens_a_row, index_t head_dim) noexcept {
  return keys.invalid() == nullptr && keys.head_dim() > 0 && keys.head_dim() == head_dim &&
         keys.sequences() == sequences && keys.kv_heads() == kv_heads && tokens_a_row > 0 &&
         tokens_a_row <= max_count && keys.capacity() <= max_count &&
         (keys.capacity() + tokens_a_row - 1) / tokens_a_row <= rows &&
         invalid_lengths(from, sequences, keys.capacity()) == nullptr;
}

}  // namespace detail

/// Writes the 4-bit codes of the tokens from from(sequence) on, of all with no `from`: low is the
/// smallest element of a key, step (largest - low) / 15, and codes are rounded half to even.
/// (Twilight, arXiv 2502.02770) With centres, keys less their centre; where a sequence starts at
/// token 0 that first becomes the mean of the tokens' finite elements, 0 of none, and later calls
/// leave it (ours). Neither allocates nor synchronises. O(new tokens * head_dim).
template <backend Backend, kv_source Keys>
  requires std::same_as<typename Keys::memory, typename ops<Backend>::memory>
[[nodiscard]] status quantise(const Backend& on, const Keys& keys,
                              const int4_keys<typename Keys::memory>& to,
                              const lengths_view<typename Keys::memory>& from = {}) noexcept {
  if (to.invalid() != nullptr || !detail::has_place(keys, from, to.sequences(), to.kv_heads(),
                                                    to.capacity(), 1, to.head_dim())) {
    return status::invalid_argument;
  }
  return ops<Backend>::quantise(on, keys, from, to);
}

/// Brings the bounds of the pages from that of token from(sequence) on up to date, of all with no
/// `from`. (Quest, arXiv 2406.10774) Neither allocates nor synchronises.
/// O(tokens of those pages * head_dim).
template <backend Backend, kv_source Keys>
  requires std::same_as<typename Keys::memory, typename ops<Backend>::memory>
[[nodiscard]] status bound_pages(const Backend& on, const Keys& keys,
                                 const page_bounds<typename Keys::memory>& to,
                                 const lengths_view<typename Keys::memory>& from = {}) noexcept {
  const auto& b = to.bounds;
  if (b.malformed() || b.extent(3) != 2 ||
      !detail::has_place(keys, from, b.extent(0), b.extent(1), b.extent(2), to.page_tokens,
                         b.extent(4))) {
    return status::invalid_argument;
  }
  return ops<Backend>::bound_pages(on, keys, from, to);
}

}  // namespace refreekv::inline v0
