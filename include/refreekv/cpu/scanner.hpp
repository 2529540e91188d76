// SPDX-License-Identifier: Apache-2.0
// The norm scan's work for one chunk or one query head, executed by one worker.
#pragma once

#include "refreekv/cpu/scan_scratch.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// One chunk of one KV head of one sequence.
struct chunk_index {
  index_t sequence;
  index_t chunk;
  index_t kv_head;
};

template <class Layer>
class scanner {
 public:
  scanner(const norm_scan& scan, const Layer& layer, const norm_scan_buffers& buffers,
          const scan_scratch& scratch) noexcept
      : scan_(scan),
        layer_(layer),
        buffers_(buffers),
        scratch_(scratch),
        heads_(layer.q_heads() / layer.kv_heads()) {}

  /// Packs the queries of one query head.
  void pack(index_t sequence, index_t q_head) const noexcept
    requires has_queries<Layer>
  {
    pack_queries(layer_, sequence, q_head, scan_.window, packed(sequence, q_head / heads_));
  }

  /// Reads one chunk of one KV head and writes its statistics. Prefetches the next chunk.
  void read_chunk(int worker, const chunk_index& at, const chunk_index& next) const noexcept {
    const tile_scratch tile = attend_chunk(worker, at, next, output::statistics);
    store_statistics(tile, at);
  }

  /// Writes the normalisers of the rows of one query head. Ready rows are normalised already.
  void normalise_rows(index_t sequence, index_t q_head) const noexcept {
    const head_view h = head(sequence, q_head);
    for (index_t r = h.first_row; r < scan_.window; ++r) {
      if constexpr (has_queries<Layer>) {
        const auto& sinks = layer_.info.attention.sink_logits;
        h.rows[r] = detail::normalise(
            h.statistics + r * buffers_.chunks, chunks_of(sequence).count(),
            sinks.data() != nullptr ? sinks(q_head) : -std::numeric_limits<float>::infinity());
      } else {
        h.rows[r] = {0, 1};
      }
    }
  }

  /// Reads a chunk again, for a mean over several rows, which needs their normalisers. Writes the
  /// chunk's energy in place of `sum_squares` of the first row that exists.
  void read_chunk_again(int worker, const chunk_index& at, const chunk_index& next) const noexcept {
    const tile_scratch tile = attend_chunk(worker, at, next, output::values);
    const token_range range = chunks_of(at.sequence)[at.chunk];
    const index_t first = window_of(at.sequence).first_row();
    if (first == scan_.window) return;
    store_statistics(tile, at);  // the first read may have had other exponents
    for (index_t g = 0; g < heads_; ++g) {
      const head_view h = head(at.sequence, at.kv_head * heads_ + g);
      const auto energies = token_energies(tile, h, at, g);
      h.statistics[first * buffers_.chunks + at.chunk].sum_squares =
          size(range) == 0 ? 0 : energies.tokens.sum();
    }
  }

  /// Adds a query head's norms at the chunks' starts to norms [chunk].
  void add_norms(index_t sequence, index_t q_head, double* norms) const noexcept {
    const head_view h = head(sequence, q_head);
    double suffix = outside_cut(h, sequence);
    for (index_t c = chunks_of(sequence).count() - 1; c >= scan_.first_chunk(); --c) {
      suffix += energy(h, c);
      norms[c] += std::sqrt(suffix);
    }
  }

  /// Adds the norms of one KV head's query heads at each token of a chunk to norms [chunk_tokens].
  /// Raises masses [chunk_tokens] to the largest attention that a row gives to the candidates
  /// before each token.
  void add_chunk_norms(int worker, const chunk_index& at, double* norms,
                       float* masses) const noexcept {
    const tile_scratch tile = attend_chunk(worker, at, at, output::values);
    const chunking chunks = chunks_of(at.sequence);
    const auto tokens = static_cast<Eigen::Index>(size(chunks[at.chunk]));
    // Sequential sums first; the element-wise work on them then uses whole registers.
    double sums[static_cast<std::size_t>(chunk_tokens)];
    const Eigen::Map<Eigen::ArrayXd> sum(sums, tokens);
    Eigen::Map<Eigen::ArrayXd> norm(norms, tokens);
    Eigen::Map<Eigen::ArrayXf> most(masses, tokens);
    for (index_t g = 0; g < heads_; ++g) {
      const head_view h = head(at.sequence, at.kv_head * heads_ + g);
      for (index_t r = h.first_row; r < scan_.window; ++r) {
        const chunk_statistics* row = h.statistics + r * buffers_.chunks;
        double mass = 0;
        for (index_t c = scan_.first_chunk(); c < at.chunk; ++c) {
          mass += detail::weight_of(row[c].exponent, h.rows[r]) * static_cast<double>(row[c].sum);
        }
        const index_t i = g * scan_.window + r;
        const double attention = detail::weight_of(tile.statistics[i].exponent, h.rows[r]);
        for (index_t t = 0; t < tokens; ++t) {
          sums[t] = mass;
          mass += attention * static_cast<double>(tile.values[i * tile_stride + t]);
        }
        most = (most.max)(sum.cast<float>());
      }
      double suffix = outside_cut(h, at.sequence);
      for (index_t c = chunks.count() - 1; c > at.chunk; --c) suffix += energy(h, c);
      const auto energies = token_energies(tile, h, at, g);
      for (Eigen::Index t = tokens - 1; t >= 0; --t) {
        suffix += energies.scale * static_cast<double>(energies.tokens[t]);
        sums[t] = suffix;
      }
      norm += sum.sqrt();
    }
  }

  [[nodiscard]] chunking chunks_of(index_t sequence) const noexcept {
    return {layer_.tokens(sequence), scan_.sinks};
  }

 private:
  /// The arrays of one query head of one sequence.
  struct head_view {
    chunk_statistics* statistics;  ///< [window, chunk]
    row_normaliser* rows;          ///< [window]
    index_t first_row;             ///< the first row that exists
  };
  /// Energies of a chunk's tokens: that of token t is scale * tokens[t].
  struct energy_view {
    double scale;
    Eigen::Map<Eigen::ArrayXf> tokens;
  };

  [[nodiscard]] static index_t size(token_range range) noexcept { return range.end - range.begin; }

  [[nodiscard]] query_window window_of(index_t sequence) const noexcept {
    return refreekv::window_of(layer_, sequence, scan_.window);
  }

  [[nodiscard]] head_view head(index_t sequence, index_t q_head) const noexcept {
    const index_t i = (sequence * layer_.q_heads() + q_head) * scan_.window;
    return {buffers_.statistics + i * buffers_.chunks, buffers_.rows + i,
            window_of(sequence).first_row()};
  }

  /// Returns the packed queries of a KV head.
  [[nodiscard]] packed_queries packed(index_t sequence, index_t kv_head) const noexcept {
    return {scratch_.queries + (sequence * layer_.kv_heads() + kv_head) * scratch_.query_bytes,
            are_many(heads_ * window_of(sequence).count())};
  }

  [[nodiscard]] chunk_place place_of(const chunk_index& at) const noexcept {
    return {at.sequence, at.kv_head, chunks_of(at.sequence)[at.chunk]};
  }

  void store_statistics(const tile_scratch& tile, const chunk_index& at) const noexcept {
    // The rows of a KV head's query heads are contiguous: [q_head, window].
    const index_t first = (at.sequence * layer_.kv_heads() + at.kv_head) * heads_ * scan_.window;
    for (index_t i = 0; i < heads_ * scan_.window; ++i) {
      buffers_.statistics[(first + i) * buffers_.chunks + at.chunk] = tile.statistics[i];
    }
  }

  /// Attends to a chunk and returns the worker's tile. Prefetches the next chunk.
  tile_scratch attend_chunk(int worker, const chunk_index& at, const chunk_index& next,
                            output wanted) const noexcept {
    const tile_scratch tile = scratch_.tiles.of(worker);
    cpu_detail::attend_chunk(layer_, window_of(at.sequence), packed(at.sequence, at.kv_head),
                             place_of(at), place_of(next), wanted, tile);
    return tile;
  }

  /// Returns the energy that no cut removes.
  [[nodiscard]] double outside_cut(const head_view& h, index_t sequence) const noexcept {
    double energies = 0;
    if (scan_.norm == norm_scope::full_row) {
      const index_t tokens = (std::min)(layer_.tokens(sequence), scan_.sinks);
      for (index_t c = 0; c < chunking::of_sinks(tokens); ++c) energies += energy(h, c);
    }
    return energies;
  }

  /// Returns the energy of a chunk.
  [[nodiscard]] double energy(const head_view& h, index_t chunk) const noexcept {
    return detail::chunk_energy(scan_, h.statistics + chunk, buffers_.chunks, h.rows, h.first_row);
  }

  /// Returns the energies of the tokens for the KV head's query head g. Overwrites its values.
  energy_view token_energies(const tile_scratch& tile, const head_view& h, const chunk_index& at,
                             index_t g) const noexcept {
    const query_window window = window_of(at.sequence);
    const token_range range = chunks_of(at.sequence)[at.chunk];
    const chunk_statistics* statistics = tile.statistics + g * scan_.window;
    const auto values_of = [&](index_t row) {
      return Eigen::Map<Eigen::ArrayXf>(tile.values + (g * scan_.window + row) * tile_stride,
                                        static_cast<Eigen::Index>(size(range)));
    };
    auto energies = values_of(0);
    const double largest =
        detail::largest_attention(statistics, 1, h.rows, h.first_row, scan_.window);
    if (largest <= 0 || window.first_row() > 0) energies.setZero();
    if (largest <= 0) return {0, energies};
    for (index_t r = window.first_row(); r < window.rows; ++r) {
      const auto weight =
          static_cast<float>(detail::weight_of(statistics[r].exponent, h.rows[r]) / largest);
      auto values = values_of(r);
      values *= weight;
      if (scan_.average == row_average::frobenius) values = values.square();
      if (r > 0) energies += values;
    }
    if (scan_.average == row_average::mean && window.all_see(range)) {
      energies = (energies / static_cast<float>(window.rows)).square();
    } else if (scan_.average == row_average::mean) {
      for (index_t t = range.begin; t < range.end; ++t) {
        const index_t rows = window.rows_seeing(t);
        float& mean = energies(static_cast<Eigen::Index>(t - range.begin));
        mean = rows == 0 ? 0.0f : mean / static_cast<float>(rows);
        mean *= mean;
      }
    }
    return {largest * largest, energies};
  }

  const norm_scan& scan_;
  const Layer& layer_;
  const norm_scan_buffers& buffers_;
  const scan_scratch& scratch_;
  index_t heads_;  // query heads per KV head
};

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
