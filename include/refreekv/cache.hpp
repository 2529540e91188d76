// SPDX-License-Identifier: Apache-2.0
// The keys or the values of one layer: what a source of them is, dense and segmented ones.
#pragma once

#include <concepts>

#include "refreekv/view.hpp"

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

/// One strided tensor per cache.
template <class T, class Memory = host_memory>
class dense {
 public:
  using element_type = T;
  using memory = Memory;

  /// rows: [sequence, kv_head, token, head_dim], axes in any order in memory.
  constexpr explicit dense(view<T, 4, Memory> rows, lengths_view<Memory> lengths = {}) noexcept
      : rows_(rows), lengths_(lengths) {}
  template <class Length>
    requires(!std::is_same_v<std::remove_const_t<Length>, position_t>)
  constexpr dense(view<T, 4, Memory>, view<Length, 1, Memory>) noexcept {
    static_assert(sizeof(Length) == 0, "lengths are int32 (position_t): convert those of 64 bits");
  }

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t sequences() const noexcept {
    return rows_.extent(0);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t kv_heads() const noexcept {
    return rows_.extent(1);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t capacity() const noexcept {
    return rows_.extent(2);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t head_dim() const noexcept {
    return rows_.extent(3);
  }

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    return length_of(lengths_, sequence, capacity());
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_run<T> run_at(index_t sequence,
                                                                   index_t kv_head,
                                                                   index_t token) const noexcept {
    return {rows_.at(sequence, kv_head, token), tokens(sequence) - token, rows_.stride(2),
            rows_.stride(3)};
  }
  /// Where the tensor begins: known without lengths or tables, which a device may have.
  [[nodiscard]] constexpr token_run<T> first_slot_row() const noexcept {
    return {rows_.data(), 0, rows_.stride(2), rows_.stride(3)};
  }
  [[nodiscard]] constexpr bool repeats_heads() const noexcept {
    return kv_heads() > 1 && rows_.stride(1) == 0;
  }
  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (rows_.malformed()) return "dense rows need a pointer and extents >= 0";
    return invalid_lengths(lengths_, sequences(), capacity());
  }

 private:
  view<T, 4, Memory> rows_;
  lengths_view<Memory> lengths_;
};

/// Slots [begin, begin + tokens) of a segmented cache.
struct segment {
  position_t begin;
  position_t tokens;
};

/// A dense tensor whose tokens lie in up to three runs of slots, in time order: a ring buffer that
/// has wrapped is [head, end) then [0, head); sinks and a ring are three.
template <class T, class Memory = host_memory>
class segmented {
 public:
  using element_type = T;
  using memory = Memory;

  /// rows: [sequence, kv_head, slot, head_dim]; segments: [sequence, 1 to 3].
  constexpr segmented(view<T, 4, Memory> rows, view<const segment, 2, Memory> segments) noexcept
      : slots_(rows), segments_(segments) {}

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t sequences() const noexcept {
    return slots_.extent(0);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t kv_heads() const noexcept {
    return slots_.extent(1);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t capacity() const noexcept {
    return slots_.extent(2);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t head_dim() const noexcept {
    return slots_.extent(3);
  }

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    index_t tokens = 0;
    for (index_t i = 0; i < segments_.extent(1); ++i) tokens += segments_(sequence, i).tokens;
    return at_most(capacity(), tokens);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_run<T> run_at(index_t sequence,
                                                                   index_t kv_head,
                                                                   index_t token) const noexcept {
    index_t i = 0;
    while (token >= segments_(sequence, i).tokens) token -= segments_(sequence, i++).tokens;
    const segment& part = segments_(sequence, i);
    return {slots_.at(sequence, kv_head, part.begin + token), part.tokens - token, slots_.stride(2),
            slots_.stride(3)};
  }
  /// Where the tensor begins: known without lengths or tables, which a device may have.
  [[nodiscard]] constexpr token_run<T> first_slot_row() const noexcept {
    return {slots_.data(), 0, slots_.stride(2), slots_.stride(3)};
  }
  [[nodiscard]] constexpr bool repeats_heads() const noexcept {
    return kv_heads() > 1 && slots_.stride(1) == 0;
  }
  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (slots_.malformed()) return "segmented slots need a pointer and extents >= 0";
    if (segments_.malformed() || segments_.extent(0) != sequences() || segments_.extent(1) < 1 ||
        segments_.extent(1) > 3) {
      return "segments must be [sequence, 1 to 3]";
    }
    if constexpr (std::same_as<Memory, host_memory>) {
      for (index_t s = 0; s < sequences(); ++s) {
        for (index_t i = 0; i < segments_.extent(1); ++i) {
          const segment& part = segments_(s, i);
          if (part.begin < 0 || part.tokens < 0 || index_t{part.begin} + part.tokens > capacity()) {
            return "a segment is outside the slots";
          }
          for (index_t j = 0; j < i; ++j) {
            const segment& other = segments_(s, j);
            if (part.tokens > 0 && other.tokens > 0 &&
                part.begin < index_t{other.begin} + other.tokens &&
                other.begin < index_t{part.begin} + part.tokens) {
              return "segments overlap";
            }
          }
        }
      }
    }
    return nullptr;
  }

 private:
  view<T, 4, Memory> slots_;
  view<const segment, 2, Memory> segments_;
};

}  // namespace refreekv::inline v0
