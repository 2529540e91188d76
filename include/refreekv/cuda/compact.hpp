// SPDX-License-Identifier: Apache-2.0
// Moving the rows of a cache on a device, in place, whatever its layout.
//
// Columns of a row are independent of each other, so a block moves a slice of the columns of all
// rows of one (sequence, kv_head): blocks need not know of each other, and there are enough of them
// for one long sequence. Within a slice, rows go in an order in which none lands where a later one
// still is: a tile of them is read and, after a barrier, written. The next one need not wait for
// that.
#pragma once

#include <cstring>

#include "refreekv/cache/source.hpp"
#include "refreekv/cuda/block/block.hpp"
#include "refreekv/decision/compaction.hpp"
#include "refreekv/decision/kept_positions.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Rows of one (sequence, kv_head) that move, as if through a buffer: row i of `count` goes from
/// slot source(i) to slot target(i). Both ascend with i, and targets are either all at most the
/// sources, so that rows go in ascending order, or all at least.
struct range_moves {
  index_t count;
  token_move move;

  [[nodiscard]] REFREEKV_DEVICE bool ascending() const noexcept {
    return move.target <= move.source;
  }
  [[nodiscard]] REFREEKV_DEVICE index_t source(index_t i) const noexcept { return move.source + i; }
  [[nodiscard]] REFREEKV_DEVICE index_t target(index_t i) const noexcept { return move.target + i; }
};

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

/// An item is a slice of the columns of one (sequence, kv_head). Kept is a view of kept_range, or
/// kept_positions.
template <kv_source Source, class Kept>
struct compact_body {
  using element_type = typename Source::element_type;

  /// As many as there are registers for, without a spill.
  static constexpr int resident_blocks = 3;

  static constexpr int element_bytes = sizeof(element_type);
  static constexpr int row_threads = 4;
  static constexpr int rows_a_round = block_threads / row_threads;
  static constexpr int rounds = 4;  // reads that a thread has on their way
  static_assert(rounds * rows_a_round == block_threads);

  /// What a thread moves of a row: 16 bytes, where they are a whole number of elements.
  static constexpr int piece_elements = element_bytes < 16 ? 16 / element_bytes : 1;
  static constexpr bool piece_is_vector = piece_elements * element_bytes == sizeof(vector16);
  static constexpr int slice_elements = row_threads * piece_elements;
  struct piece {
    vector16 of[(sizeof(element_type) * piece_elements + 15) / 16];
  };

  /// Where a row's slice is and where it goes; null where it stays.
  struct row {
    const element_type* from;
    element_type* to;
    index_t from_stride;
    index_t to_stride;
  };
  /// A thread finds one row of a tile, and moves pieces of others. The next tile's rows are found
  /// while some threads still write the last one's: there are three.
  struct shared {
    row tiles[3][block_threads];
  };

  Source source;
  Kept kept;
  compaction mode;

  [[nodiscard]] REFREEKV_HOST_DEVICE index_t slices() const noexcept {
    return (source.head_dim() + slice_elements - 1) / slice_elements;
  }

  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t head = item / slices(), column = item % slices() * slice_elements;
    const index_t sequence = head / source.kv_heads(), kv_head = head % source.kv_heads();
    const auto moves = moves_of(kept, sequence, kv_head, mode);
    const auto find_tile = [&](row* tile, index_t first) {
      tile[block.rank()] = find(moves, first + block.rank(), sequence, kv_head, column);
    };
    const index_t left = source.head_dim() - column;
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
      // A page is found in a table, which takes as long as a read of a row: at the same time.
      find_tile(s.tiles[tile], first + block_threads);
      block.sync();
      REFREEKV_UNROLL
      for (int i = 0; i < rounds; ++i) write(held[i], rows[i * rows_a_round], place, columns);
    }
  }

 private:
  /// The n-th row to move.
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

  /// Whether the row moves 16 bytes at a time.
  [[nodiscard]] REFREEKV_DEVICE bool in_vectors(const row& r) const noexcept {
    const auto addresses =
        reinterpret_cast<std::uintptr_t>(r.from) | reinterpret_cast<std::uintptr_t>(r.to);
    return piece_is_vector && r.from_stride == 1 && r.to_stride == 1 &&
           addresses % sizeof(vector16) == 0 && source.head_dim() % piece_elements == 0;
  }

  // Both take the row by value: for all that the compiler knows, a write changes shared memory.

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
      // Bits, as an engine's element type may have no constructor that device code can call.
      void* element = to + d * r.to_stride;
      std::memcpy(__builtin_assume_aligned(element, alignof(element_type)),
                  reinterpret_cast<const char*>(&from) + i * element_bytes, sizeof(element_type));
    }
  }
};

/// Both forms of the primitive, see ops. Kept is a view of kept_range, or kept_positions.
template <class Backend, kv_source Source, class Kept>
[[nodiscard]] status compact(const Backend& exec, const Source& source, const Kept& kept,
                             compaction mode) noexcept {
  using element_type = typename Source::element_type;
  static_assert(std::is_trivially_copyable_v<element_type> && !std::is_const_v<element_type>,
                "compaction needs a cache that can be written");
  const compact_body<Source, Kept> body{source, kept, mode};
  return run_blocks(exec, source.sequences() * source.kv_heads() * body.slices(), body);
}

}  // namespace refreekv::inline v0::cuda_detail
