// SPDX-License-Identifier: Apache-2.0
// A query head as the norm scan sees it, and the second read of a chunk for token energies.
#pragma once

#include "refreekv/backend/norm_scan.hpp"
#include "refreekv/cuda/window_attention.hpp"

namespace refreekv::inline v0::cuda_detail {

/// One query head of one sequence: its window, chunk statistics and row normalisers.
struct scanned_head {
  norm_scan scan;
  query_window window;
  index_t number;                ///< [sequence, q_head], flattened
  index_t chunks;                ///< chunks of the longest sequence
  chunk_statistics* statistics;  ///< [window, chunk]
  const row_normaliser* rows;    ///< [window]

  template <class Layer>
  [[nodiscard]] static REFREEKV_DEVICE scanned_head of(const norm_scan& scan, const Layer& layer,
                                                       const norm_scan_buffers& buffers,
                                                       index_t sequence, index_t q_head) noexcept {
    const index_t number = sequence * layer.q_heads() + q_head, row = number * scan.window;
    return {scan,           window_of(layer, sequence, scan.window),   number,
            buffers.chunks, buffers.statistics + row * buffers.chunks, buffers.rows + row};
  }

  [[nodiscard]] REFREEKV_DEVICE chunk_statistics& statistics_of(index_t row,
                                                                index_t chunk) const noexcept {
    return statistics[row * chunks + chunk];
  }

  /// Returns the attention that a value of 1 in a chunk stands for, in one row.
  [[nodiscard]] REFREEKV_DEVICE double attention(index_t row, index_t chunk) const noexcept {
    return detail::weight_of(statistics_of(row, chunk).exponent, rows[row]);
  }

  /// As detail::largest_attention, but computed by a warp together, which all lanes must call.
  /// O(window / warp_threads)
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE double largest_attention(Block& block,
                                                         index_t chunk) const noexcept {
    double largest = 0;
    REFREEKV_NO_UNROLL
    for (index_t r = window.first_row() + lane_of(block); r < scan.window; r += warp_threads) {
      largest = larger_or_nan{}(largest, attention(r, chunk));
    }
    return block.warp_reduce(largest, larger_or_nan{});
  }

  /// Returns the energy of a chunk. O(window)
  [[nodiscard]] REFREEKV_DEVICE double energy(index_t chunk) const noexcept {
    return detail::chunk_energy(scan, statistics + chunk, chunks, rows, window.first_row());
  }

  /// Returns the energy of the sinks, which no cut removes; 0 unless the norm is over full rows.
  /// Computed by a warp together.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE double outside_cut(Block& block) const noexcept {
    double energies = 0;
    if (scan.norm == norm_scope::full_row) {
      const index_t sinks = window.tokens < scan.sinks ? window.tokens : scan.sinks;
      const index_t count = chunking::of_sinks(sinks);
      for (index_t c = lane_of(block); c < count; c += warp_threads) energies += energy(c);
      energies = block.warp_reduce(energies, plus{});
    }
    return energies;
  }
};

/// Returns the place of all rows of one KV head's query heads, for some tokens.
template <class Layer>
[[nodiscard]] REFREEKV_DEVICE tile_place kv_head_place(const Layer& layer, const norm_scan& scan,
                                                       index_t sequence, index_t kv_head,
                                                       token_range tokens) noexcept {
  const int group = narrow(layer.q_heads() / layer.kv_heads()), of = narrow(kv_head);
  return {narrow(sequence), of, {of * group, group, 0, narrow(scan.window)}, 0, tokens};
}

/// Returns the number of rows of one KV head: query heads of the group times window.
template <class Layer>
[[nodiscard]] index_t rows_of_kv_head(const norm_scan& scan, const Layer& layer) noexcept {
  return layer.q_heads() / layer.kv_heads() * scan.window;
}

/// Reads a chunk of one KV head again and computes the energies of its tokens. For each query head
/// of the KV head all threads call on_head(head, energy). `energy` is that of the thread's token,
/// in units of the head's largest_attention squared. After each tile of rows all threads call
/// on_tile(place); the block is synchronised then, and on_tile may overwrite the tile's values.
/// O(q_heads of the KV head * window * chunk_tokens * head_dim)
template <int Rows, thread_block Block, class Layer, class OnHead, class OnTile>
REFREEKV_DEVICE void for_each_energy(Block& block, tile<Layer, Rows>& s, const Layer& layer,
                                     const norm_scan& scan, const norm_scan_buffers& buffers,
                                     index_t chunk, tile_place at, const OnHead& on_head,
                                     const OnTile& on_tile) noexcept {
  const query_window window = window_of(layer, at.sequence, scan.window);
  const bool mean = scan.average == row_average::mean;
  const bool own = block.rank() < at.size();
  const auto head_of = [&](int i) {
    return scanned_head::of(scan, layer, buffers, at.sequence, at.span.q_head_of(i));
  };
  float energy = 0;
  for (at.first = 0; at.first < at.span.count(); at.first += Rows) {
    attend<leaves::values, any_lanes>(block, s, layer, scan.window, at);
    set_weights(block, s, [&](int i) {
      const int of = at.first + i;
      if (of >= at.span.count() || at.span.row_of(of) < window.first_row()) return 0.0f;
      const scanned_head head = head_of(of);
      const double largest = head.largest_attention(block, chunk);
      const double attention =
          detail::weight_of(s.statistics[i].exponent, head.rows[at.span.row_of(of)]);
      return largest == 0 ? 0.0f : static_cast<float>(attention / largest);
    });
    REFREEKV_NO_UNROLL
    for (int i = 0; i < Rows && at.first + i < at.span.count(); ++i) {
      const float value = own ? s.values[i][block.rank()] * s.weights[i] : 0;
      energy += mean ? value : value * value;
      if (at.span.row_of(at.first + i) < window.rows - 1) continue;
      if (mean && own) {
        const index_t rows = window.rows_seeing(at.tokens.begin + block.rank());
        energy = rows == 0 ? 0 : energy / static_cast<float>(rows);
        energy *= energy;
      }
      on_head(head_of(at.first + i), energy);
      energy = 0;
    }
    block.sync();
    on_tile(at);
    block.sync();
  }
}

}  // namespace refreekv::inline v0::cuda_detail
