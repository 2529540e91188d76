// SPDX-License-Identifier: Apache-2.0
// Sources: how a caller describes the keys or the values of one layer, in any layout.
#pragma once

#include <concepts>

#include "refreekv/core/element.hpp"
#include "refreekv/core/view.hpp"

namespace refreekv::inline v0 {

/// Rows that one pointer and two strides reach. Every kernel reads a cache run by run.
template <class T>
struct token_run {
  T* data;               ///< [token, head_dim]
  index_t tokens;        ///< rows from `data` on
  index_t token_stride;  ///< elements
  index_t dim_stride;    ///< elements; 1 is the fast case
};

/// The sizes of a cache.
struct cache_shape {
  index_t sequences;
  index_t kv_heads;
  index_t capacity;  ///< the most tokens that any sequence may have; workspaces are sized by it
  index_t head_dim;

  [[nodiscard]] constexpr bool operator==(const cache_shape&) const = default;
};

/// The keys of one layer: [sequence, kv_head, token, head_dim]. Each sequence has its own number of
/// tokens, oldest first.
/// - `shape()`: the sizes. `tokens(s)`: the tokens of a sequence, in [0, capacity].
/// - `invalid()`: null, or an error of the description in words. O(tables).
template <class S>
concept key_source = requires(const S& source, index_t i) {
  typename S::memory;
  { source.shape() } -> std::same_as<cache_shape>;
  { source.tokens(i) } -> std::same_as<index_t>;
  { source.invalid() } -> std::same_as<const char*>;
};

/// A key_source whose rows can be read in place. It is a trivially copyable description of memory.
/// run_at must not copy a row into a buffer of its own, because kernels locate many rows before
/// they read any. So caches that split keys along head_dim, [head_dim / x][slot][x], cannot be row
/// sources.
/// - `run_at(s, h, t)`: the evenly spaced rows from token t on, at least one. Requires 0 <= t <
///   tokens(s).
template <class S>
concept row_source = key_source<S> && requires(const S& source, index_t i) {
  typename S::element_type;
  { source.run_at(i, i, i) } -> std::same_as<token_run<typename S::element_type>>;
};

/// A source that holds only this rank's tokens of each sequence (context parallelism): see
/// shard.hpp.
/// - `owns(s, t)`: whether this rank has token t; run_at requires it.
template <class S>
concept sharded_source = key_source<S> && requires(const S& source, index_t i) {
  { source.owns(i, i) } -> std::same_as<bool>;
};

/// A source of all keys, or all values, row by row. Keys and values are two sources, so their
/// head_dim, strides and types may differ, and values may be missing.
template <class S>
concept kv_source = row_source<S> && !sharded_source<S>;

namespace detail {

/// Rejects at compile time, with a message, a source that owns the memory it describes.
template <class Source>
constexpr void check_source() noexcept {
  static_assert(std::is_trivially_copyable_v<Source>,
                "a source describes memory that stays where it is: it must be trivially copyable, "
                "and run_at must not copy rows into a buffer");
}

}  // namespace detail

/// Lengths [sequence] of a ragged batch, in tokens. With a null pointer every sequence has
/// `capacity` tokens.
template <class Memory = host_memory>
using lengths_view = view<const position_t, 1, Memory>;

/// A number of tokens, limited to [0, capacity]. Lengths on a device cannot be checked before use,
/// so stale ones must not lead past the cache.
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t at_most(index_t capacity,
                                                             index_t tokens) noexcept {
  return tokens < 0 ? 0 : tokens < capacity ? tokens : capacity;
}

/// Number of tokens of a sequence, in [0, capacity].
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
