// SPDX-License-Identifier: Apache-2.0
// What the norm scan does with one chunk, one query head or one KV head: the work of one worker.
#pragma once

#include "refreekv/cpu/attention.hpp"

namespace refreekv::inline v0::cpu_detail {

/// 4 * head_dim * window bytes for each query head, and 1024 * window for each query head of a KV
/// head and worker.
struct scan_scratch {
  float* queries;  ///< [sequence, q_head, window, head_dim]; null for ready rows
  tile_scratch tiles;
  index_t tile_rows;  ///< of a worker
  index_t head_dim;

  template <class Seen>
  static scan_scratch take(arena& from, index_t workers, const norm_scan& scan,
                           const Seen& seen) noexcept {
    constexpr index_t line = arena::alignment / sizeof(float);  // no two workers share one
    const auto padded = [](index_t n) { return (n + line - 1) / line * line; };
    scan_scratch s{};
    s.tile_rows = padded(seen.q_heads() / seen.kv_heads() * scan.window);
    if constexpr (requires { seen.queries; }) {
      s.head_dim = padded(seen.head_dim());
      s.queries = from.take<float>(seen.sequences(), seen.q_heads(), scan.window, seen.head_dim());
    }
    s.tiles.values = from.take<float>(workers, s.tile_rows, chunk_tokens);
    s.tiles.peaks = from.take<float>(workers, s.tile_rows);
    s.tiles.gathered = from.take<float>(workers, gather_tokens, s.head_dim);
    s.tiles.energies = from.take<float>(workers, chunk_tokens);
    return s;
  }

  [[nodiscard]] tile_scratch of(index_t worker) const noexcept {
    return {tiles.values + worker * tile_rows * chunk_tokens, tiles.peaks + worker * tile_rows,
            tiles.gathered + worker * gather_tokens * head_dim,
            tiles.energies + worker * chunk_tokens};
  }
};

/// The arrays of one sequence's query head.
struct head_view {
  chunk_statistics* statistics;  ///< [window, chunk]
  row_normaliser* rows;          ///< [window]
  double* energies;              ///< [chunk]
};

template <class Seen>
class scanner {
 public:
  scanner(const norm_scan& scan, const Seen& seen, const norm_scan_buffers& buffers,
          const scan_scratch& scratch) noexcept
      : scan_(scan),
        seen_(seen),
        buffers_(buffers),
        scratch_(scratch),
        heads_(seen.q_heads() / seen.kv_heads()) {}

  /// Reads one chunk of one KV head and leaves its statistics.
  void read_chunk(int worker, index_t sequence, index_t kv_head, index_t chunk) const noexcept {
    const tile_scratch tile = attend_chunk(worker, sequence, kv_head, chunk);
    const index_t tokens = size(chunks_of(sequence)[chunk]);
    for (index_t i = 0; i < heads_ * scan_.window; ++i) {
      const row_map x(tile.values + i * chunk_tokens, tokens);
      head(sequence, kv_head * heads_ + i / scan_.window)
          .statistics[i % scan_.window * buffers_.chunks + chunk] = {
          tile.peaks[i], tokens == 0 ? 0.0f : x.sum(), tokens == 0 ? 0.0f : x.square().sum()};
    }
  }

  /// Normalisers of the rows of one query head.
  void normalise_rows(index_t sequence, index_t q_head) const noexcept {
    const index_t chunks = chunks_of(sequence).count();
    const auto& logits = seen_.info.attention.sink_logits;
    const float sink =
        logits.data() != nullptr ? logits(q_head) : -std::numeric_limits<float>::infinity();
    const head_view h = head(sequence, q_head);
    for (index_t r = window_of(sequence).first_row(); r < scan_.window; ++r) {
      h.rows[r] = normalise(h.statistics + r * buffers_.chunks, chunks, sink);
    }
  }

  /// Chunk energies of one query head from its statistics: for what is one pass.
  void energies_from_statistics(index_t sequence, index_t q_head) const noexcept {
    const head_view h = head(sequence, q_head);
    for (index_t c = 0; c < chunks_of(sequence).count(); ++c) {
      double energy = 0;
      for (index_t r = window_of(sequence).first_row(); r < scan_.window; ++r) {
        const chunk_statistics& s = h.statistics[r * buffers_.chunks + c];
        const double attention = Seen::attention_at(s.peak, h.rows[r]);
        energy += attention * attention * double{s.sum_squares};
      }
      h.energies[c] = energy;
    }
  }

  /// Chunk energies of one KV head's query heads from a second read of the chunk.
  void energies_from_chunk(int worker, index_t sequence, index_t kv_head,
                           index_t chunk) const noexcept {
    const tile_scratch tile = attend_chunk(worker, sequence, kv_head, chunk);
    const token_range range = chunks_of(sequence)[chunk];
    for (index_t g = 0; g < heads_; ++g) {
      const head_view h = head(sequence, kv_head * heads_ + g);
      const double unit = token_energies(tile, h, sequence, g, range);
      h.energies[chunk] =
          size(range) == 0 ? 0 : unit * double{row_map(tile.energies, size(range)).sum()};
    }
  }

  /// Adds a query head's norms at the chunks' starts to norms [chunk].
  void add_norms(index_t sequence, index_t q_head, double* norms) const noexcept {
    const double* energies = head(sequence, q_head).energies;
    double suffix = outside_cut(energies);
    for (index_t c = chunks_of(sequence).count() - 1; c >= 1; --c) {
      suffix += energies[c];
      norms[c] += std::sqrt(suffix);
    }
  }

  /// Adds the norms of one KV head's query heads inside a chunk to norms [chunk_tokens], and raises
  /// masses [chunk_tokens] to the most that a row gives to candidates before each token.
  void add_chunk_norms(int worker, index_t sequence, index_t kv_head, index_t chunk, double* norms,
                       double* masses) const noexcept {
    const tile_scratch tile = attend_chunk(worker, sequence, kv_head, chunk);
    const chunking chunks = chunks_of(sequence);
    const token_range range = chunks[chunk];
    for (index_t g = 0; g < heads_; ++g) {
      const head_view h = head(sequence, kv_head * heads_ + g);
      double suffix = outside_cut(h.energies);
      for (index_t c = chunks.count() - 1; c > chunk; --c) suffix += h.energies[c];
      const double unit = token_energies(tile, h, sequence, g, range);
      for (index_t t = size(range) - 1; t >= 0; --t) {
        suffix += unit * double{tile.energies[t]};
        norms[t] += std::sqrt(suffix);
      }
      for (index_t r = window_of(sequence).first_row(); r < scan_.window; ++r) {
        const chunk_statistics* row = h.statistics + r * buffers_.chunks;
        double mass = 0;
        for (index_t c = 1; c < chunk; ++c) {
          mass += Seen::attention_at(row[c].peak, h.rows[r]) * double{row[c].sum};
        }
        const index_t i = g * scan_.window + r;
        const double attention = Seen::attention_at(tile.peaks[i], h.rows[r]);
        for (index_t t = 0; t < size(range); ++t) {
          masses[t] = std::max(masses[t], mass);
          mass += attention * double{tile.values[i * chunk_tokens + t]};
        }
      }
    }
  }

  [[nodiscard]] chunking chunks_of(index_t sequence) const noexcept {
    return {seen_.tokens(sequence), scan_.sinks};
  }

 private:
  [[nodiscard]] static index_t size(token_range range) noexcept { return range.end - range.begin; }

  [[nodiscard]] query_window window_of(index_t sequence) const noexcept {
    return {seen_.tokens(sequence), scan_.window, seen_.info.attention.sliding_window};
  }

  [[nodiscard]] head_view head(index_t sequence, index_t q_head) const noexcept {
    const index_t i = sequence * seen_.q_heads() + q_head;
    return {buffers_.statistics + i * scan_.window * buffers_.chunks,
            buffers_.rows + i * scan_.window, buffers_.energies + i * buffers_.chunks};
  }

  tile_scratch attend_chunk(int worker, index_t sequence, index_t kv_head,
                            index_t chunk) const noexcept {
    const tile_scratch tile = scratch_.of(worker);
    attend(seen_, window_of(sequence), sequence, kv_head, chunks_of(sequence)[chunk],
           scratch_.queries, tile);
    return tile;
  }

  /// Energy that no cut removes.
  [[nodiscard]] double outside_cut(const double* energies) const noexcept {
    return scan_.norm == norm_scope::full_row ? energies[0] : 0;
  }

  /// tile.energies [range] of the KV head's query head g, in units of the returned value.
  double token_energies(const tile_scratch& tile, const head_view& h, index_t sequence, index_t g,
                        token_range range) const noexcept {
    const query_window window = window_of(sequence);
    const float* peaks = tile.peaks + g * window.rows;
    double largest = 0;  // NaN once any row's attention is
    for (index_t r = window.first_row(); r < window.rows; ++r) {
      const double attention = Seen::attention_at(peaks[r], h.rows[r]);
      if (!(attention <= largest)) largest = attention;
      if (std::isnan(largest)) break;
    }
    row_map energies(tile.energies, size(range));
    energies.setZero();
    if (largest == 0) return 0;
    for (index_t r = window.first_row(); r < window.rows; ++r) {
      const auto weight = static_cast<float>(Seen::attention_at(peaks[r], h.rows[r]) / largest);
      const row_map values(tile.values + (g * window.rows + r) * chunk_tokens, size(range));
      if (scan_.average == row_average::frobenius) {
        energies += (weight * values).square();
      } else {
        energies += weight * values;
      }
    }
    if (scan_.average == row_average::mean) {
      for (index_t t = range.begin; t < range.end; ++t) {
        const index_t rows = window.rows_seeing(t);
        float& energy = energies(t - range.begin);
        energy = rows == 0 ? 0.0f : energy / static_cast<float>(rows);
        energy *= energy;
      }
    }
    return largest * largest;
  }

  const norm_scan& scan_;
  const Seen& seen_;
  const norm_scan_buffers& buffers_;
  const scan_scratch& scratch_;
  index_t heads_;  // query heads of a KV head
};

}  // namespace refreekv::inline v0::cpu_detail
