// SPDX-License-Identifier: Apache-2.0
// The second half of the norm scan on a device: the loss curve inside the chunk where the loss
// crosses the threshold, and the cut.
#pragma once

#include "refreekv/cuda/last_allowed.hpp"
#include "refreekv/cuda/norm_curve.hpp"

namespace refreekv::inline v0::cuda_detail {

/// norm_scan::crossing, computed by a whole block. O(chunks / threads)
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE index_t crossing(Block& block, warp_values<index_t>& shared,
                                               const norm_scan& scan, const double* norms,
                                               index_t chunks) noexcept {
  const index_t first = scan.first_chunk();
  return first + last_allowed(block, shared, scan, norms + first, chunks - first, norms[first]);
}

/// Writes the contribution of each KV head to the curves inside its group's crossing chunk:
/// head_norms and head_masses. Writes zeros where there is nothing to decide.
template <class Layer, int Rows>
struct crossing_body {
  struct shared {
    cuda_detail::tile<Layer, Rows> tile;
    warp_values<index_t> last;
    warp_values<double> sums;
  };
  norm_scan scan;
  Layer layer;
  norm_scan_buffers buffers;
  scan_scratch scratch;

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const auto [sequence, kv_head] = head_place::of(item, layer.kv_heads());
    const index_t groups = scan.groups(layer.kv_heads());
    const index_t group = groups == 1 ? 0 : kv_head;
    const double* norms = buffers.norms + (sequence * groups + group) * buffers.chunks;
    const int t = block.rank();
    const query_window window = window_of(layer, sequence, scan.window);
    double norm = 0;
    float mass = 0;
    if (scan.decides(window.tokens, norms)) {
      const chunking chunks{window.tokens, scan.sinks};
      const index_t chunk = crossing(block, s.last, scan, norms, chunks.count());
      tile_place at = kv_head_place(layer, scan, sequence, kv_head, chunks[chunk]);
      if (!detail::has_chunk_at(layer, sequence, at.tokens.begin))
        at.span.heads = 0;  // another rank owns the chunk
      for_each_energy(
          block, s.tile, layer, scan, buffers, chunk, at,
          [&](const scanned_head& head, float energy) {
            const double after = energy_after(block, head, chunk, chunks.count());
            const double largest = head.largest_attention(block, chunk);
            const double own = t < at.size() ? largest * largest * double{energy} : 0;
            const double from_here = after + block_suffix_sum(block, s.sums, own).own;
            if (t < at.size()) norm += std::sqrt(from_here);
          },
          [&](const tile_place& tile) {
            for (int i = warp_of(block); i < Rows; i += block_warps) {
              if (exists(tile, window, i)) {
                masses_before(block, s.tile, i, tile, chunk);
              }
            }
            block.sync();
            for (int i = 0; i < Rows && t < at.size(); ++i) {
              if (exists(tile, window, i)) mass = larger{}(mass, s.tile.values[i][t]);
            }
          });
    }
    scratch.head_norms[item * chunk_tokens + t] = norm;
    scratch.head_masses[item * chunk_tokens + t] = mass;
  }

 private:
  /// Returns a query head's energy after a chunk, from the curve that norm_curve wrote.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE double energy_after(Block& block, const scanned_head& head,
                                                    index_t chunk, index_t chunks) const noexcept {
    if (chunk + 1 == chunks) return head.outside_cut(block);
    const double norm = scratch.head_curves[head.number * buffers.chunks + chunk + 1];
    return norm * norm;
  }

  [[nodiscard]] static REFREEKV_DEVICE bool exists(const tile_place& tile,
                                                   const query_window& window, int i) noexcept {
    const int of = tile.first + i;
    return of < tile.span.count() && tile.span.row_of(of) >= window.first_row();
  }

  /// Replaces a row's values by the attention to all candidates before each of their tokens.
  /// Computed by a warp.
  template <thread_block Block>
  REFREEKV_DEVICE void masses_before(Block& block, cuda_detail::tile<Layer, Rows>& s, int i,
                                     const tile_place& at, index_t chunk) const noexcept {
    const int of = at.first + i;
    const index_t row = at.span.row_of(of);
    const scanned_head head =
        scanned_head::of(scan, layer, buffers, at.sequence, at.span.q_head_of(of));
    float* values = s.values[i];
    double before = 0;
    REFREEKV_NO_UNROLL
    for (index_t c = scan.first_chunk() + lane_of(block); c < chunk; c += warp_threads) {
      const chunk_statistics& statistics = head.statistics_of(row, c);
      before += detail::weight_of(statistics.exponent, head.rows[row]) * double{statistics.sum};
    }
    before = block.warp_reduce(before, plus{});
    const double attention = detail::weight_of(s.statistics[i].exponent, head.rows[row]);
    REFREEKV_NO_UNROLL
    for (int base = 0; base < at.size(); base += warp_threads) {
      const int t = base + lane_of(block);
      const double own = t < at.size() ? attention * double{values[t]} : 0;
      const double up_to_here = before + block.warp_prefix_sum(own);
      if (t < at.size()) values[t] = static_cast<float>(up_to_here - own);
      before = block.warp_broadcast(up_to_here, warp_threads - 1);
    }
  }
};

/// For the KV heads of each group, sums norms and finds the largest mass. Writes chunk_norms and
/// chunk_masses, both [sequence, group, chunk_tokens].
template <class Layer>
struct join_heads_body {
  struct shared {};
  norm_scan scan;
  Layer layer;
  norm_scan_buffers buffers;
  scan_scratch scratch;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return layer.sequences() * scan.groups(layer.kv_heads());
  }

  /// item: [sequence, group]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t heads = layer.kv_heads() / scan.groups(layer.kv_heads());
    double norm = 0;
    float mass = 0;
    for (index_t h = item * heads; h < (item + 1) * heads; ++h) {
      norm += scratch.head_norms[h * chunk_tokens + block.rank()];
      mass = larger{}(mass, scratch.head_masses[h * chunk_tokens + block.rank()]);
    }
    buffers.chunk_norms[item * chunk_tokens + block.rank()] = norm;
    buffers.chunk_masses[item * chunk_tokens + block.rank()] = mass;
  }
};

/// Writes kept [sequence, group]: detail::stop, computed by a whole block.
template <class Layer>
struct find_cuts_body {
  struct shared {
    warp_values<index_t> last;
  };
  norm_scan scan;
  Layer layer;
  norm_scan_buffers buffers;
  kept_ranges<typename Layer::memory> kept;

  [[nodiscard]] constexpr index_t items() const noexcept { return kept.extent(0) * kept.extent(1); }

  /// item: [sequence, group]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t groups = kept.extent(1), tokens = layer.tokens(item / groups);
    const double* norms = buffers.norms + item * buffers.chunks;
    const double* chunk_norms = buffers.chunk_norms + item * chunk_tokens;
    kept_range decision = position_ranking(tokens, scan.sinks).undecided();
    if (scan.decides(tokens, norms)) {
      const chunking chunks{tokens, scan.sinks};
      const double baseline = norms[scan.first_chunk()];
      const index_t chunk = crossing(block, s.last, scan, norms, chunks.count());
      const token_range range = chunks[chunk];
      const index_t last =
          last_allowed(block, s.last, scan, chunk_norms, range.end - range.begin, baseline);
      decision = detail::cut_at(scan, tokens, chunk, last, baseline, chunk_norms[last],
                                buffers.chunk_masses[item * chunk_tokens + last]);
    }
    if (block.rank() == 0) kept(item / groups, item % groups) = decision;
  }
};

template <class Backend, class Layer>
[[nodiscard]] status crossing_curve(const Backend& exec, const norm_scan& scan, const Layer& layer,
                                    const norm_scan_buffers& buffers,
                                    const scan_scratch& scratch) noexcept {
  const status s = with_tile<few_rows<Layer>>(rows_of_kv_head(scan, layer), [&](auto rows) {
    const crossing_body<Layer, rows()> body{scan, scaled(layer), buffers, scratch};
    return run_blocks(exec, kv_head_items(layer), body);
  });
  if (s != status::ok) return s;
  const join_heads_body<Layer> body{scan, layer, buffers, scratch};
  return run_blocks(exec, body.items(), body);
}

template <class Backend, class Layer>
[[nodiscard]] status find_cuts(const Backend& exec, const norm_scan& scan, const Layer& layer,
                               const norm_scan_buffers& buffers,
                               const kept_ranges<typename Layer::memory>& kept) noexcept {
  const find_cuts_body<Layer> body{scan, layer, buffers, kept};
  return run_blocks(exec, body.items(), body);
}

}  // namespace refreekv::inline v0::cuda_detail
