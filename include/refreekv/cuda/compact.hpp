// SPDX-License-Identifier: Apache-2.0
// Moves the rows of a cache on a device, in place, for any layout.
//
// The columns of a row are independent. A block therefore moves a slice of the columns of all rows
// of one (sequence, kv_head): blocks need no synchronisation, and even one long sequence has enough
// of them. Within a slice, rows move in an order in which no row overwrites a later one that is
// still to be moved. A tile of rows is read and, after a barrier, written. The next tile is read
// without waiting for these writes.
#pragma once

#include <cstring>

#include "refreekv/cache/source.hpp"
#include "refreekv/cuda/block/places.hpp"
#include "refreekv/decision/compaction.hpp"
#include "refreekv/decision/kept_positions.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The rows of one (sequence, kv_head) that move, as if through a buffer: row i of `count` moves
/// from slot source(i) to slot target(i). Both ascend with i. Either no target is above its source,
/// and rows move in ascending order, or no target is below it, and they move in descending order.
struct range_moves {
  index_t count;
  token_move move;

  [[nodiscard]] REFREEKV_DEVICE bool ascending() const noexcept {
    return move.target <= move.source;
  }
  [[nodiscard]] REFREEKV_DEVICE index_t source(index_t i) const noexcept { return move.source + i; }
  [[nodiscard]] REFREEKV_DEVICE index_t target(index_t i) const noexcept { return move.target + i; }
};

/// As range_moves, but row i comes from positions[i * stride] and goes to first_slot + i.
struct position_moves {
  index_t count;
  const position_t* positions;
  index_t stride;
  index_t first_slot;
  compaction mode;

  [[nodiscard]] REFREEKV_DEVICE bool ascending() const noexcept {
    return mode == compaction::suffix_down;
  }
  [[nodiscard]] REFREEKV_DEVICE index_t source(index_t i) const noexcept {
    return positions[i * stride];
  }
  [[nodiscard]] REFREEKV_DEVICE index_t target(index_t i) const noexcept { return first_slot + i; }
};

template <class Memory>
[[nodiscard]] REFREEKV_DEVICE position_moves moves_of(const kept_positions<Memory>& kept,
                                                      index_t sequence, index_t kv_head,
                                                      compaction mode) noexcept {
  const kept_tokens k = kept.counts(sequence, kv_head);
  return {k.dropped() == 0 ? 0 : k.count, kept.positions.at(sequence, kv_head),
          kept.positions.stride(2), first_slot(k, mode), mode};
}
template <class Range, class Memory>
[[nodiscard]] REFREEKV_DEVICE range_moves moves_of(const view<Range, 2, Memory>& kept,
                                                   index_t sequence, index_t kv_head,
                                                   compaction mode) noexcept {
  const index_t group = kept.extent(1) == 1 ? 0 : kv_head;
  const token_move move = move_of(kept(sequence, group), mode);
  return {move.tokens, move};
}

/// Moves a slice of the columns of one (sequence, kv_head), which is an item. Kept is a view of
/// kept_range, or kept_positions.
template <kv_source Source, class Kept>
struct compact_body {
  using element_type = typename Source::element_type;

  /// As many blocks as registers allow without a spill.
  static constexpr int resident_blocks = 3;

  static constexpr int element_bytes = sizeof(element_type);
  static constexpr int row_threads = 4;
  static constexpr int rows_a_round = block_threads / row_threads;
  static constexpr int rounds = 4;  // reads that a thread has in flight
  static_assert(rounds * rows_a_round == block_threads);

  /// What a thread moves of a row at a time: 16 bytes if that is a whole number of elements.
  static constexpr int piece_elements = element_bytes < 16 ? 16 / element_bytes : 1;
  static constexpr bool piece_is_vector = piece_elements * element_bytes == sizeof(vector16);
  static constexpr int slice_elements = row_threads * piece_elements;
  struct piece {
    vector16 of[(sizeof(element_type) * piece_elements + 15) / 16];
  };

  /// Source and target of a row's slice; null if the row stays.
  struct row {
    const element_type* from;
    element_type* to;
    index_t from_stride;
    index_t to_stride;
  };
  /// Each thread finds one row of a tile, and moves pieces of other rows. There are three tiles:
  /// the next tile's rows are found while some threads still write the previous one.
  struct shared {
    row tiles[3][block_threads];
  };

  Source source;
  Kept kept;
  compaction mode;

  [[nodiscard]] REFREEKV_HOST_DEVICE index_t slices() const noexcept {
    return (source.shape().head_dim + slice_elements - 1) / slice_elements;
  }

  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const part_place at = part_place::of(item, source.shape().kv_heads, slices());
    const index_t sequence = at.sequence, kv_head = at.head;
    const index_t column = at.part * slice_elements;
    const auto moves = moves_of(kept, sequence, kv_head, mode);
    const auto find_tile = [&](row* tile, index_t first) {
      tile[block.rank()] = find(moves, first + block.rank(), sequence, kv_head, column);
    };
    const index_t left = source.shape().head_dim - column;
    const int columns = left < slice_elements ? static_cast<int>(left) : slice_elements;
    const int first_row = block.rank() / row_threads, place = block.rank() % row_threads;

    int tile = 0;
    find_tile(s.tiles[tile], 0);
    block.sync();
    for (index_t first = 0; first < moves.count; first += block_threads) {
      const row* rows = s.tiles[tile] + first_row;
      tile = tile == 2 ? 0 : tile + 1;
      piece held[rounds];
      REFREEKV_UNROLL
      for (int i = 0; i < rounds; ++i) read(held[i], rows[i * rows_a_round], place, columns);
      // A page is looked up in a table, which takes as long as reading a row: both overlap.
      find_tile(s.tiles[tile], first + block_threads);
      block.sync();
      REFREEKV_UNROLL
      for (int i = 0; i < rounds; ++i) write(held[i], rows[i * rows_a_round], place, columns);
    }
  }

 private:
  /// Returns the n-th row to move.
  [[nodiscard]] REFREEKV_DEVICE row find(const auto& moves, index_t n, index_t sequence,
                                         index_t kv_head, index_t column) const noexcept {
    if (n >= moves.count) return {};
    const index_t i = moves.ascending() ? n : moves.count - 1 - n;
    const index_t from_slot = moves.source(i), to_slot = moves.target(i);
    if (from_slot == to_slot) return {};
    const auto from = source.run_at(sequence, kv_head, from_slot);
    const auto to = source.run_at(sequence, kv_head, to_slot);
    return {from.data + column * from.dim_stride, to.data + column * to.dim_stride, from.dim_stride,
            to.dim_stride};
  }

  /// Whether the row moves in pieces of 16 bytes.
  [[nodiscard]] REFREEKV_DEVICE bool in_vectors(const row& r) const noexcept {
    const auto addresses =
        reinterpret_cast<std::uintptr_t>(r.from) | reinterpret_cast<std::uintptr_t>(r.to);
    return piece_is_vector && r.from_stride == 1 && r.to_stride == 1 &&
           addresses % sizeof(vector16) == 0 && source.shape().head_dim % piece_elements == 0;
  }

  // Both take the row by value: a write could alias shared memory, so the compiler would reload it.

  REFREEKV_DEVICE void read(piece& to, const row r, int place, int columns) const noexcept {
    if (r.from == nullptr) return;
    const element_type* from = in_global(r.from);
    if (in_vectors(r)) {
      const int d = place * piece_elements;
      if (d < columns) to.of[0] = *reinterpret_cast<const vector16*>(from + d);
      return;
    }
    REFREEKV_UNROLL
    for (int i = 0; i < piece_elements; ++i) {
      const int d = i * row_threads + place;
      if (d >= columns) break;
      const void* element = from + d * r.from_stride;
      std::memcpy(reinterpret_cast<char*>(&to) + i * element_bytes,
                  __builtin_assume_aligned(element, alignof(element_type)), sizeof(element_type));
    }
  }

  REFREEKV_DEVICE void write(const piece& from, const row r, int place,
                             int columns) const noexcept {
    if (r.to == nullptr) return;
    element_type* to = in_global(r.to);
    if (in_vectors(r)) {
      const int d = place * piece_elements;
      if (d < columns) *reinterpret_cast<vector16*>(to + d) = from.of[0];
      return;
    }
    REFREEKV_UNROLL
    for (int i = 0; i < piece_elements; ++i) {
      const int d = i * row_threads + place;
      if (d >= columns) break;
      // Copies bits: an engine's element type may have no constructor that device code can call.
      void* element = to + d * r.to_stride;
      std::memcpy(__builtin_assume_aligned(element, alignof(element_type)),
                  reinterpret_cast<const char*>(&from) + i * element_bytes, sizeof(element_type));
    }
  }
};

/// Both forms of the primitive `compact`, see ops. Kept is a view of kept_range, or kept_positions.
/// O(rows moved * head_dim)
template <class Backend, kv_source Source, class Kept>
[[nodiscard]] status compact(const Backend& exec, const Source& source, const Kept& kept,
                             compaction mode) noexcept {
  using element_type = typename Source::element_type;
  static_assert(std::is_trivially_copyable_v<element_type> && !std::is_const_v<element_type>,
                "compaction needs a cache that can be written");
  const compact_body<Source, Kept> body{source, kept, mode};
  return run_blocks(exec, kv_head_items(source) * body.slices(), body);
}

}  // namespace refreekv::inline v0::cuda_detail
