// SPDX-License-Identifier: Apache-2.0
// Scratch of the attention of a window's rows to all tokens of their sequences.
#pragma once

#include "refreekv/cpu/window_attention.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Scratch of for_each_attention. Values of all chunks are kept until the rows' normalisers are
/// known, so that keys are multiplied once. Each KV head of a wave has a slot.
struct attention_scratch {
  index_t slot_count;            ///< KV heads of a wave
  index_t rows;                  ///< rows of each query head that are processed together
  index_t chunks;                ///< of the longest sequence
  float* values;                 ///< [slot, chunk, q_head of the KV head, rows, tile_stride]
  chunk_statistics* statistics;  ///< [2, slot, q_head of the KV head, rows, chunk]
  double* sums;                  ///< [slot, 2, q_head of the KV head, capacity]
  double* totals;                ///< [sequence, kv_head, chunk, q_heads of the KV head + 1]
  // What each worker has of the slot that it attends to.
  worker_tiles tiles;
  std::byte* queries;  ///< [worker, query_bytes]; null for ready rows
  index_t query_bytes;
  row_normaliser* normalisers;  ///< [worker, q_head of the KV head, rows]
  index_t* left_out;            ///< [worker, slot]: rows that were left out

  template <class Layer>
  static attention_scratch carve(arena& from, index_t workers, index_t window,
                                 const Layer& layer) noexcept {
    // As many rows as repay reading the keys for them, but fewer where sequences may be long: up to
    // a capacity of 131,072 tokens their values take at most 9 MB of a slot, unless a KV head has
    // more than 16 query heads.
    constexpr index_t slot_values = index_t{1} << 21, least_rows = 16, most_rows = 64;
    constexpr index_t worker_bytes = index_t{4} << 20;  // of slots for each worker
    const index_t heads = layer.q_heads() / layer.kv_heads(), capacity = layer.capacity();
    const index_t fit = slot_values / (std::max)(capacity, index_t{1});
    const index_t together = std::clamp(fit, least_rows, most_rows) / heads;
    attention_scratch s{};
    s.rows = std::clamp<index_t>(together, 1, (std::max)(window, index_t{1}));
    s.chunks = chunking{capacity, 0}.count();
    const index_t rows = heads * s.rows;
    arena slot;
    (void)slot.array<float>(s.chunks, rows, tile_stride);
    (void)slot.array<double>(index_t{2}, heads, capacity);
    const index_t slot_bytes = whole_lines(slot.bytes());
    s.slot_count =
        std::clamp<index_t>(workers * worker_bytes / slot_bytes, 1,
                            (std::max)(layer.sequences() * layer.kv_heads(), index_t{1}));
    s.values = from.array<float>(s.slot_count, s.chunks, rows, tile_stride);
    s.statistics = from.array<chunk_statistics>(index_t{2}, s.slot_count, rows, s.chunks);
    s.sums = from.array<double>(s.slot_count, index_t{2}, heads, capacity);
    s.totals = from.array<double>(layer.sequences(), layer.kv_heads(), s.chunks, heads + 1);
    workers = (std::min)(workers, s.slot_count * s.chunks);
    s.tiles = worker_tiles::carve(from, workers, rows, 0, layer);
    if constexpr (has_queries<Layer>) {
      s.query_bytes = packed_bytes<product_of<Layer>>(rows, layer.head_dim());
      s.queries = from.array<std::byte>(workers, s.query_bytes);
    }
    s.normalisers = from.array<row_normaliser>(workers, rows);
    s.left_out = from.array<index_t>(workers, s.slot_count);
    return s;
  }
};

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
