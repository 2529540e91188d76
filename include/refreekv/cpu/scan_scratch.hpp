// SPDX-License-Identifier: Apache-2.0
// Scratch of the norm scan on the CPU, besides norm_scan_buffers.
#pragma once

#include "refreekv/backend/norm_scan.hpp"
#include "refreekv/cpu/window_attention.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Packed queries of all rows, and for each worker the tile of one KV head. A tile takes 1100 bytes
/// for each query head and row, plus gathered keys; plus a chunk of floats for packed keys.
struct scan_scratch {
  std::byte* queries;   ///< [sequence, kv_head, packed_bytes]; null for ready rows
  index_t query_bytes;  ///< packed_bytes of a KV head
  worker_tiles tiles;

  template <class Layer>
  static scan_scratch carve(arena& from, index_t workers, const norm_scan& scan,
                            const Layer& layer) noexcept {
    const index_t rows = layer.q_heads() / layer.kv_heads() * scan.window;
    scan_scratch s{};
    if constexpr (has_queries<Layer>) {
      s.query_bytes = packed_bytes<product_of<Layer>>(rows, layer.head_dim());
      s.queries = from.array<std::byte>(layer.sequences(), layer.kv_heads(), s.query_bytes);
    }
    s.tiles = worker_tiles::carve(from, workers, rows, rows, layer);
    return s;
  }
};

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
