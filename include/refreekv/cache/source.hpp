// SPDX-License-Identifier: Apache-2.0
// What a source is: the keys or the values of one layer, wherever their rows lie.
#pragma once

#include <concepts>

#include "refreekv/core/view.hpp"

namespace refreekv::inline v0 {

/// Rows that one pointer and two strides reach: the unit in which every kernel reads a cache.
template <class T>
struct token_run {
  T* data;               ///< [token, head_dim]
  index_t tokens;        ///< rows from `data` on
  index_t token_stride;  ///< elements
  index_t dim_stride;    ///< elements; 1 wherever it is to be fast
};

/// The keys of one layer: [sequence, kv_head, token, head_dim], each sequence with its own number
/// of tokens, oldest first.
/// - `capacity()`: no sequence ever has more tokens; workspaces are sized by it.
/// - `invalid()`: null, or what is wrong with the description, in words. O(tables).
template <class S>
concept key_source = requires(const S& source, index_t i) {
  typename S::memory;
  { source.sequences() } -> std::same_as<index_t>;
  { source.kv_heads() } -> std::same_as<index_t>;
  { source.head_dim() } -> std::same_as<index_t>;
  { source.capacity() } -> std::same_as<index_t>;
  { source.tokens(i) } -> std::same_as<index_t>;
  { source.invalid() } -> std::same_as<const char*>;
};

/// Whose rows can be read where they are: a source is a description of memory, trivially copyable.
/// One that copies a row into a buffer of its own would be wrong, as many rows are located before
/// any is read; so caches whose keys are split along head_dim, [head_dim / x][slot][x], are none.
/// - `run_at(s, h, t)`: the rows from token t on, as many as are evenly spaced, at least one;
///   requires 0 <= t < tokens(s).
template <class S>
concept row_source = key_source<S> && requires(const S& source, index_t i) {
  typename S::element_type;
  { source.run_at(i, i, i) } -> std::same_as<token_run<typename S::element_type>>;
};

/// Some tokens of each sequence, the others of which are on other ranks: see shard.hpp.
/// - `owns(s, t)`: whether token t is here; run_at requires it.
template <class S>
concept sharded_source = key_source<S> && requires(const S& source, index_t i) {
  { source.owns(i, i) } -> std::same_as<bool>;
};

/// All keys, or values, row by row. The two are two sources, so their head sizes, strides and types
/// may differ and values may be missing.
template <class S>
concept kv_source = row_source<S> && !sharded_source<S>;

namespace detail {

/// Refuses, in words, a source that owns what it describes.
template <class Source>
constexpr void check_source() noexcept {
  static_assert(std::is_trivially_copyable_v<Source>,
                "a source describes memory that stays where it is: it must be trivially copyable, "
                "and run_at must not copy rows into a buffer");
}

}  // namespace detail

/// Lengths [sequence] of a ragged batch; with no pointer every sequence has `capacity` tokens.
template <class Memory = host_memory>
using lengths_view = view<const position_t, 1, Memory>;

/// A number of tokens, in [0, capacity]. Nobody can look at a device's lengths before they are
/// used: those that an engine did not bring up to date must not lead past the cache.
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t at_most(index_t capacity,
                                                             index_t tokens) noexcept {
  return tokens < 0 ? 0 : tokens < capacity ? tokens : capacity;
}

/// A sequence's length.
template <class Memory>
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t length_of(const lengths_view<Memory>& lengths,
                                                               index_t sequence,
                                                               index_t capacity) noexcept {
  return lengths.data() == nullptr ? capacity : at_most(capacity, lengths(sequence));
}

template <class Memory>
[[nodiscard]] constexpr const char* invalid_lengths(const lengths_view<Memory>& lengths,
                                                    index_t sequences, index_t capacity) noexcept {
  if (lengths.data() == nullptr) return nullptr;
  if (lengths.extent(0) != sequences) return "lengths must be [sequence]";
  if constexpr (std::same_as<Memory, host_memory>) {
    for (index_t s = 0; s < sequences; ++s) {
      if (lengths(s) < 0 || lengths(s) > capacity) return "a length is outside [0, tokens]";
    }
  }
  return nullptr;
}

}  // namespace refreekv::inline v0
