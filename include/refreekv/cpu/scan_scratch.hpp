// SPDX-License-Identifier: Apache-2.0
// Scratch of the norm scan on the CPU, besides norm_scan_buffers.
#pragma once

#include "refreekv/backend/norm_scan.hpp"
#include "refreekv/cpu/attention.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Whether a layer has keys and queries, not ready attention rows.
template <class Layer>
concept has_queries = requires(const Layer& layer) { layer.queries; };

/// Packed queries of all rows, and for each worker the tile of one KV head. A tile takes 1100 bytes
/// for each query head and row, plus four keys; plus a chunk of floats for packed keys.
struct scan_scratch {
  void* queries;  ///< [sequence, q_head, window, packed_dim]; null for ready rows
  tile_scratch tiles;
  // Per worker: rows of `values`, elements of `statistics`, bytes of `gathered`, floats of
  // `unpacked`. No two workers share a cache line.
  index_t rows, statistics_of, gathered_of, unpacked_of;

  template <class Layer>
  static scan_scratch carve(arena& from, index_t workers, const norm_scan& scan,
                            const Layer& layer) noexcept {
    constexpr index_t line = arena::alignment;
    const auto whole_lines = [](index_t n) { return (n + line - 1) / line * line; };
    scan_scratch s{};
    s.rows = layer.q_heads() / layer.kv_heads() * scan.window;  // query rows per KV head
    s.statistics_of = (s.rows + 15) / 16 * 16;                  // 16 of 12 bytes fill whole lines
    if constexpr (has_queries<Layer>) {
      using product = product_of<Layer>;
      const index_t dim = layer.head_dim();
      s.queries = from.array<typename product::packed>(layer.sequences(), layer.q_heads(),
                                                       scan.window, packed_dim<product>(dim));
      using keys = std::remove_cvref_t<decltype(layer.keys)>;
      s.gathered_of = whole_lines(tile_tokens * dim * index_t{sizeof(multiplied_key<keys>)});
      if constexpr (packed_keys<keys>) s.unpacked_of = whole_lines(chunk_tokens * dim);
    }
    s.tiles.values = from.array<float>(workers, s.rows, tile_stride);
    s.tiles.statistics = from.array<chunk_statistics>(workers, s.statistics_of);
    s.tiles.gathered = from.array<std::byte>(workers, s.gathered_of);
    s.tiles.unpacked = from.array<float>(workers, s.unpacked_of);
    return s;
  }

  [[nodiscard]] tile_scratch of(index_t worker) const noexcept {
    return {tiles.values + worker * rows * tile_stride, tiles.statistics + worker * statistics_of,
            static_cast<std::byte*>(tiles.gathered) + worker * gathered_of,
            tiles.unpacked + worker * unpacked_of};
  }
};

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
