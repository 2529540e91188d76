// SPDX-License-Identifier: Apache-2.0
// Updates what decoding reads instead of the keys, 4-bit keys and page bounds, after new tokens.
#pragma once

#include "refreekv/backend/backend.hpp"

namespace refreekv::inline v0 {

namespace detail {

/// Null, or the reason why an index of [sequence, kv_head, rows, ..] cannot hold all of `keys`.
template <kv_source Keys>
[[nodiscard]] constexpr const char* has_no_place(const Keys& keys,
                                                 const lengths_view<typename Keys::memory>& from,
                                                 index_t sequences, index_t kv_heads, index_t rows,
                                                 index_t tokens_a_row, index_t head_dim) noexcept {
  if (const char* why = keys.invalid()) return why;
  if (keys.shape().head_dim < 1 || keys.shape().head_dim != head_dim)
    return "keys and index differ in head_dim";
  if (keys.shape().sequences != sequences) return "keys and index differ in sequences";
  if (keys.shape().kv_heads != kv_heads) return "keys and index differ in kv_heads";
  if (tokens_a_row < 1 || tokens_a_row > max_count) return "page_tokens must be in [1, 2^31 - 1]";
  if (keys.shape().capacity > max_count) return "a sequence may have 2^31 - 1 tokens at most";
  if ((keys.shape().capacity + tokens_a_row - 1) / tokens_a_row > rows) {
    return "the index has no place for the capacity of the keys";
  }
  return invalid_lengths(from, sequences, keys.shape().capacity);
}

}  // namespace detail

/// Null, or the reason in words why `quantise` would return invalid_argument. O(tables).
template <kv_source Keys>
[[nodiscard]] constexpr const char* why_invalid(
    const Keys& keys, const int4_keys<typename Keys::memory>& to,
    const lengths_view<typename Keys::memory>& from = {}) noexcept {
  if (const char* why = to.invalid()) return why;
  return detail::has_no_place(keys, from, to.shape().sequences, to.shape().kv_heads,
                              to.shape().capacity, 1, to.shape().head_dim);
}

/// Writes the 4-bit codes of the tokens from from(sequence) on; of all tokens if `from` has no
/// pointer. low is the smallest element of a key, step is (largest - low) / 15, and codes are
/// rounded half to even. (Twilight, arXiv 2502.02770) With centres, codes are of keys minus their
/// centre. If a sequence starts at token 0, the centre is first set to the mean of the tokens'
/// finite elements, or 0 if there are none; later calls do not change it (ours). Neither allocates
/// nor synchronises. O(new tokens * head_dim).
template <backend Backend, kv_source Keys>
  requires std::same_as<typename Keys::memory, typename ops<Backend>::memory>
[[nodiscard]] status quantise(const Backend& exec, const Keys& keys,
                              const int4_keys<typename Keys::memory>& to,
                              const lengths_view<typename Keys::memory>& from = {}) noexcept {
  if (why_invalid(keys, to, from) != nullptr) return status::invalid_argument;
  return ops<Backend>::quantise(exec, keys, from, to);
}

/// Null, or the reason in words why `bound_pages` would return invalid_argument. O(tables).
template <kv_source Keys>
[[nodiscard]] constexpr const char* why_invalid(
    const Keys& keys, const page_bounds<typename Keys::memory>& to,
    const lengths_view<typename Keys::memory>& from = {}) noexcept {
  const auto& b = to.bounds;
  if (b.malformed() || b.extent(3) != 2) {
    return "page bounds must be [sequence, kv_head, page, 2, head_dim]";
  }
  return detail::has_no_place(keys, from, b.extent(0), b.extent(1), b.extent(2), to.page_tokens,
                              b.extent(4));
}

/// Updates the bounds of the pages from the page of token from(sequence) on; of all pages if `from`
/// has no pointer. (Quest, arXiv 2406.10774) Neither allocates nor synchronises. O(tokens of those
/// pages * head_dim).
template <backend Backend, kv_source Keys>
  requires std::same_as<typename Keys::memory, typename ops<Backend>::memory>
[[nodiscard]] status bound_pages(const Backend& exec, const Keys& keys,
                                 const page_bounds<typename Keys::memory>& to,
                                 const lengths_view<typename Keys::memory>& from = {}) noexcept {
  if (why_invalid(keys, to, from) != nullptr) return status::invalid_argument;
  return ops<Backend>::bound_pages(exec, keys, from, to);
}

}  // namespace refreekv::inline v0
