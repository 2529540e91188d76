// SPDX-License-Identifier: Apache-2.0
// The first half of the norm scan on a device: reads the keys and writes the loss curve at the
// starts of chunks.
//
// One kernel reads the keys. All others work on three floats per chunk. Kernels read the sequence
// lengths themselves, so launches depend on extents only.
#pragma once

#include "refreekv/cuda/scanned_head.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Scratch of the norm scan, besides norm_scan_buffers. For each sequence it has 8 bytes for each
/// query head and chunk, and 3 KB for each KV head. norm_curve writes head_curves, which
/// crossing_curve reads.
struct scan_scratch {
  double* head_curves;  ///< [sequence, q_head, chunk]
  double* head_norms;   ///< [sequence, kv_head, chunk_tokens]: inside the crossing chunk
  float* head_masses;   ///< [sequence, kv_head, chunk_tokens]: likewise

  template <class Layer>
  static scan_scratch carve(arena& from, const norm_scan& scan, const Layer& layer) noexcept {
    const index_t sequences = layer.sequences(), kv_heads = layer.kv_heads();
    const index_t chunks = chunking{layer.capacity(), scan.sinks}.count();
    return {from.array<double>(sequences, layer.q_heads(), chunks),
            from.array<double>(sequences, kv_heads, chunk_tokens),
            from.array<float>(sequences, kv_heads, chunk_tokens)};
  }
};

/// Reads each chunk again and writes its energy over the first row's sum of squares. A mean over
/// rows needs their normalisers, which are known only after the first read.
template <class Layer, int Rows>
struct energies_body {
  struct shared {
    cuda_detail::tile<Layer, Rows> tile;
    warp_values<float> sums;
  };
  norm_scan scan;
  Layer layer;
  norm_scan_buffers buffers;
  row_parts cut;  ///< of the chunks of a KV head

  /// item: [sequence, part, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const part_place place = part_place::of_interleaved(item, layer.kv_heads(), cut.parts);
    for_each_chunk(layer, place, scan.sinks, cut.parts, [&](index_t chunk, token_range tokens) {
      sum(block, s, kv_head_place(layer, scan, place.sequence, place.head, tokens), chunk);
    });
  }

 private:
  template <thread_block Block>
  REFREEKV_DEVICE void sum(Block& block, shared& s, const tile_place& at,
                           index_t chunk) const noexcept {
    const query_window window = window_of(layer, at.sequence, scan.window);
    if (window.first_row() == scan.window) return;
    if (!detail::has_chunk_at(layer, at.sequence, at.tokens.begin)) return clear(block, at, chunk);
    if (at.size() == 0) return;  // an empty chunk has zeros already
    for_each_energy(
        block, s.tile, layer, scan, buffers, chunk, at,
        [&](const scanned_head& head, float energy) {
          const float sum = block_reduce(block, s.sums, energy, plus{});
          if (block.rank() == 0) {
            head.statistics_of(window.first_row(), chunk).sum_squares = sum;
          }
        },
        [](const tile_place&) {});
  }

  /// Writes zeros: the chunk belongs to another rank.
  template <thread_block Block>
  REFREEKV_DEVICE void clear(Block& block, const tile_place& at, index_t chunk) const noexcept {
    for (int i = block.rank(); i < at.span.count(); i += block_threads) {
      scanned_head::of(scan, layer, buffers, at.sequence, at.span.q_head_of(i))
          .statistics_of(at.span.row_of(i), chunk) = {};
    }
  }
};

/// Writes each query head's norms at the starts of chunks. One warp per query head.
template <class Layer>
struct head_curves_body {
  struct shared {};
  norm_scan scan;
  Layer layer;
  norm_scan_buffers buffers;
  double* head_curves;  ///< [sequence, q_head, chunk]

  [[nodiscard]] constexpr index_t items() const noexcept {
    return (layer.sequences() * layer.q_heads() + block_warps - 1) / block_warps;
  }

  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t i = item * block_warps + warp_of(block);
    if (i >= layer.sequences() * layer.q_heads()) return;
    const index_t sequence = i / layer.q_heads();
    const scanned_head head = scanned_head::of(scan, layer, buffers, sequence, i % layer.q_heads());
    const index_t count = chunking{head.window.tokens, scan.sinks}.count();
    double after = head.outside_cut(block);
    // A warp of chunks at a time, from the last chunk back; each lane has one chunk.
    for (index_t base = (count - 1) / warp_threads * warp_threads;
         base + warp_threads > scan.first_chunk(); base -= warp_threads) {
      const index_t c = base + lane_of(block);
      const bool exists = c >= scan.first_chunk() && c < count;
      const double energies = after + block.warp_suffix_sum(exists ? head.energy(c) : 0.0);
      if (exists) head_curves[i * buffers.chunks + c] = std::sqrt(energies);
      after = block.warp_broadcast(energies, 0);
    }
  }
};

/// Sums the query heads of each group. Writes norms [sequence, group, chunk], 0 for chunks without
/// candidates.
template <class Layer>
struct join_curves_body {
  struct shared {};
  norm_scan scan;
  Layer layer;
  norm_scan_buffers buffers;
  const double* head_curves;  ///< [sequence, q_head, chunk]

  [[nodiscard]] constexpr index_t items() const noexcept {
    return layer.sequences() * scan.groups(layer.kv_heads()) * blocks_for(buffers.chunks);
  }

  /// item: [sequence, group, block of chunks]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t blocks = blocks_for(buffers.chunks), groups = scan.groups(layer.kv_heads());
    const index_t c = item % blocks * block_threads + block.rank(), group = item / blocks;
    if (c >= buffers.chunks) return;
    const index_t tokens = layer.tokens(group / groups), heads = layer.q_heads() / groups;
    const bool exists = c >= scan.first_chunk() && c < chunking{tokens, scan.sinks}.count();
    double norm = 0;
    for (index_t h = group * heads; exists && h < (group + 1) * heads; ++h) {
      norm += head_curves[h * buffers.chunks + c];
    }
    buffers.norms[group * buffers.chunks + c] = norm;
  }
};

template <class Backend, class Layer>
[[nodiscard]] status read_chunks(const Backend& exec, const norm_scan& scan, const Layer& layer,
                                 const norm_scan_buffers& buffers, const scan_scratch&) noexcept {
  return read_chunks(exec, layer, scan.window, 0, scan.window, scan.sinks, buffers.chunks,
                     buffers.statistics);
}

template <class Backend, class Layer>
[[nodiscard]] status normalise_rows(const Backend& exec, const norm_scan& scan, const Layer& layer,
                                    const norm_scan_buffers& buffers,
                                    const scan_scratch&) noexcept {
  const normalise_body<Layer> body{layer,       scan.window,        0,
                                   scan.window, scan.sinks,         buffers.chunks,
                                   false,       buffers.statistics, buffers.rows};
  const status s = run_blocks(exec, body.items(), body);
  if (s != status::ok || scan.one_pass()) return s;
  return with_tile<few_rows<Layer>>(rows_of_kv_head(scan, layer), [&](auto rows) {
    const row_parts cut = row_parts::of_chunks(kv_head_items(layer), buffers.chunks);
    const energies_body<Layer, rows()> energies{scan, scaled(layer), buffers, cut};
    return run_blocks(exec, cut.items(), energies);
  });
}

template <class Backend, class Layer>
[[nodiscard]] status norm_curve(const Backend& exec, const norm_scan& scan, const Layer& layer,
                                const norm_scan_buffers& buffers,
                                const scan_scratch& scratch) noexcept {
  const head_curves_body<Layer> heads{scan, layer, buffers, scratch.head_curves};
  const status s = run_blocks(exec, heads.items(), heads);
  if (s != status::ok) return s;
  const join_curves_body<Layer> groups{scan, layer, buffers, scratch.head_curves};
  return run_blocks(exec, groups.items(), groups);
}

}  // namespace refreekv::inline v0::cuda_detail
