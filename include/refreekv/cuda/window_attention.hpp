// SPDX-License-Identifier: Apache-2.0
// Unnormalised attention of a tile of rows to a chunk; each row has its own power-of-two scale.
#pragma once

#include "refreekv/cuda/block/places.hpp"
#include "refreekv/cuda/block/row_parts.hpp"
#include "refreekv/cuda/logits.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Registers per thread that one row of a tile occupies: the thread's part of the query.
template <class Layer>
inline constexpr int row_registers = 8;
template <class Query, class Keys>
inline constexpr int row_registers<query_layer<Query, Keys>> = key_reader<Keys>::width;

/// most_rows: rows of a tile for which registers suffice. few_rows: likewise, for a body that goes
/// on to work with the values.
template <class Layer>
inline constexpr int most_rows = row_registers<Layer> > 8 ? 4 : 8;
template <class Layer>
inline constexpr int few_rows = most_rows<Layer> / 2;

/// What `attend` writes: statistics only, or the tile's values, too.
enum class leaves { statistics, values };

/// Returns exp(x) / 2^exponent. Requires a whole exponent of magnitude below exponent_limit. NaN
/// stays NaN.
[[nodiscard]] REFREEKV_DEVICE float exponential(float x, float exponent) noexcept {
  const float r = x - exponent * detail::ln2_first;
  return std::exp(r + exponent * detail::ln2_rest);
}

/// Turns a row's logits into values and returns their statistics. Called by one warp, which owns
/// the row. O(count / warp_threads)
template <leaves Leaves, thread_block Block, class Query, class Keys>
[[nodiscard]] REFREEKV_DEVICE chunk_statistics to_values(Block& block,
                                                         const query_layer<Query, Keys>&,
                                                         float* row, int count) noexcept {
  constexpr float log2e = std::numbers::log2e_v<float>;
  float peak = -infinity, sum = 0, sum_squares = 0;
  for (int t = lane_of(block); t < count; t += warp_threads) peak = larger{}(peak, row[t]);
  peak = block.warp_reduce(peak, larger{});
  const float exponent = std::rint(peak * log2e);
  const bool exact = std::fabs(exponent) < detail::exponent_limit;
  const float origin = exact || peak == -infinity ? 0 : peak;
  for (int t = lane_of(block); t < count; t += warp_threads) {
    const float value = exponential(row[t] - origin, exact ? exponent : 0);
    sum += value;
    sum_squares += value * value;
    if constexpr (Leaves == leaves::values) row[t] = value;
  }
  return {exponent, block.warp_reduce(sum, plus{}), block.warp_reduce(sum_squares, plus{})};
}

/// As above, but for ready rows: values are attention / 2^exponent.
template <leaves Leaves, thread_block Block, class Row, class Memory>
[[nodiscard]] REFREEKV_DEVICE chunk_statistics to_values(Block& block,
                                                         const row_layer<Row, Memory>&, float* row,
                                                         int count) noexcept {
  float peak = 0, sum = 0, sum_squares = 0;
  for (int t = lane_of(block); t < count; t += warp_threads) peak = larger{}(peak, row[t]);
  peak = block.warp_reduce(peak, larger{});
  const bool scaled = peak > 0 && peak < infinity;
  const float exponent = scaled ? std::rint(std::log2(peak)) : 0;
  const double scale = scaled ? detail::power_of_two(-exponent) : 1;
  for (int t = lane_of(block); t < count; t += warp_threads) {
    const auto value = static_cast<float>(double{row[t]} * scale);
    sum += value;
    sum_squares += value * value;
    if constexpr (Leaves == leaves::values) row[t] = value;
  }
  sum = block.warp_reduce(sum, plus{});
  // Tests the sum, not the peak: a row of NaN has no peak.
  return {sum == 0 ? -infinity : exponent, sum, block.warp_reduce(sum_squares, plus{})};
}

/// Writes the statistics of a tile's rows and, if asked for, their values. Requires at least one
/// token. Synchronises the block at the end. O(rows of the tile * tokens * head_dim)
template <leaves Leaves, int Lanes, int Rows, thread_block Block, class Layer>
REFREEKV_DEVICE void attend(Block& block, tile<Layer, Rows>& s, const Layer& layer, index_t rows,
                            const tile_place& at) noexcept {
  fill<Lanes>(block, s, layer, rows, at);
  for (int i = warp_of(block); i < Rows; i += block_warps) {
    const chunk_statistics own = to_values<Leaves>(block, layer, s.values[i], at.size());
    if (lane_of(block) == 0) s.statistics[i] = own;
  }
  block.sync();
}

/// Sets weights[i] of a tile to f(i), which one warp computes. Synchronises the block at the end.
template <int Rows, thread_block Block, class F>
REFREEKV_DEVICE void set_weights(Block& block, tile_rows<Rows>& s, const F& f) noexcept {
  for (int i = warp_of(block); i < Rows; i += block_warps) {
    const float exponent = f(i);
    if (lane_of(block) == 0) s.weights[i] = exponent;
  }
  block.sync();
}

/// Whether no row of a span sees any token of a range.
[[nodiscard]] REFREEKV_DEVICE bool sees_nothing(const query_window& window, const row_span& span,
                                                token_range tokens) noexcept {
  const token_range hull = window.part(span.row, span.rows).hull();
  return tokens.begin >= hull.end || tokens.end <= hull.begin;
}

/// Calls f(chunk, tokens) for chunks part, part + parts, ... of a sequence. Reads the length again
/// for each chunk, because there is no register to keep it.
template <class Layer, class F>
REFREEKV_DEVICE void for_each_chunk(const Layer& layer, const part_place& place, index_t sinks,
                                    index_t parts, const F& f) noexcept {
  for (index_t chunk = place.part;; chunk += parts) {
    const chunking chunks_of_sequence{layer.tokens(place.sequence), sinks};
    if (chunk >= chunks_of_sequence.count()) return;
    f(chunk, chunks_of_sequence[chunk]);
  }
}

/// Returns how many tiles hold all rows of a KV head.
template <int Rows>
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t row_tiles(index_t rows) noexcept {
  return (rows + Rows - 1) / Rows;
}

/// Writes statistics [sequence, q_head, rows, chunk] of some rows of the window. On a shard, chunks
/// of other ranks are written as zeros.
template <class Layer, int Rows, int Lanes>
struct statistics_body {
  struct shared {
    cuda_detail::tile<Layer, Rows> tile;
  };
  /// As many blocks as registers allow without spilling queries.
  static constexpr int resident_blocks = Rows * row_registers<Layer> <= 8    ? 4
                                         : Rows * row_registers<Layer> <= 32 ? 3
                                                                             : 2;

  Layer layer;
  index_t window;     ///< number of rows of the window
  index_t row, rows;  ///< rows [row, row + rows) of the window are read
  index_t sinks;      ///< sinks have chunks of their own
  index_t chunks;     ///< chunks of the longest sequence
  row_parts cut;      ///< of the chunks of a tile
  chunk_statistics* statistics;

  /// item: [sequence, part, kv_head, tile]. Tiles of one chunk are neighbours and share its keys in
  /// the cache.
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t kv_heads = layer.kv_heads();
    const int group = narrow(layer.q_heads() / kv_heads), rows_of_head = narrow(rows);
    const index_t tiles = row_tiles<Rows>(group * rows);
    const int tile = narrow(item % tiles);
    item /= tiles;
    const int kv_head = narrow(item % kv_heads), part = narrow(item / kv_heads % cut.parts);
    const int sequence = narrow(item / kv_heads / cut.parts);
    for (int chunk = part;; chunk += narrow(cut.parts)) {
      // As for_each_chunk, but a shard also writes zeros to all chunks past the end.
      const chunking chunks_of_sequence{layer.tokens(sequence), sinks};
      const bool is_there = chunk < chunks_of_sequence.count();
      if (!is_there && (!sharded_layer<Layer> || chunk >= chunks)) return;
      const tile_place at{sequence,
                          kv_head,
                          {kv_head * group, group, narrow(row), rows_of_head},
                          tile * Rows,
                          chunks_of_sequence[chunk]};
      read(block, s, at, chunk, is_there);
    }
  }

 private:
  template <thread_block Block>
  REFREEKV_DEVICE void read(Block& block, shared& s, const tile_place& at, index_t chunk,
                            bool is_there) const noexcept {
    const auto leave = [&](const auto& statistics_of) {
      const int i = block.rank(), of = at.first + i;
      if (i >= Rows || of >= at.span.count()) return;
      const index_t to =
          (at.sequence * layer.q_heads() + at.span.q_head_of(of)) * rows + at.span.row_of(of) - row;
      statistics[to * chunks + chunk] = statistics_of(i);
    };
    if (!is_there || !detail::has_chunk_at(layer, at.sequence, at.tokens.begin)) {
      return leave([](int) { return chunk_statistics{}; });
    }
    if (sees_nothing(window_of(layer, at.sequence, window), at.span, at.tokens)) {
      return leave([](int) { return chunk_statistics{-infinity, 0, 0}; });
    }
    attend<leaves::statistics, Lanes>(block, s.tile, layer, window, at);
    leave([&](int i) { return s.tile.statistics[i]; });
  }
};

/// Combines statistics [sequence, q_head, rows, chunk] to normalisers [sequence, q_head, window] of
/// the window's rows [row, row + rows). One warp per row. Ready rows get a normaliser of 1; if
/// `checked`, those with NaN or Inf get 0.
template <class Layer>
struct normalise_body {
  struct shared {};
  Layer layer;
  index_t window;
  index_t row, rows;
  index_t sinks;
  index_t chunks;
  bool checked;
  const chunk_statistics* statistics;
  row_normaliser* normalisers;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return (layer.sequences() * layer.q_heads() * rows + block_warps - 1) / block_warps;
  }

  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t i = item * block_warps + warp_of(block);
    const index_t head = i / rows, r = i % rows;
    if (head >= layer.sequences() * layer.q_heads()) return;
    const query_window rows_seen = window_of(layer, head / layer.q_heads(), window);
    if (row + r < rows_seen.first_row()) return;
    row_normaliser& to = normalisers[head * window + row + r];
    const row_normaliser of_row =
        normaliser(block, rows_seen.tokens, head % layer.q_heads(), statistics + i * chunks);
    if (lane_of(block) == 0) to = of_row;
  }

 private:
  template <thread_block Block>
  REFREEKV_DEVICE row_normaliser normaliser(Block& block, index_t tokens, index_t q_head,
                                            const chunk_statistics* of) const noexcept {
    const index_t count = chunking{tokens, sinks}.count();
    if constexpr (requires { layer.queries; }) {
      const auto& logits = layer.info.attention.sink_logits;
      const double sink = (logits.data() != nullptr ? double{logits(q_head)} : -double{infinity}) /
                          std::numbers::ln2;
      auto exponent = static_cast<float>(std::rint(sink));
      for (index_t c = lane_of(block); c < count; c += warp_threads) {
        exponent = larger{}(exponent, of[c].exponent);
      }
      exponent = block.warp_reduce(exponent, larger{});
      double sum = 0;
      for (index_t c = lane_of(block); c < count; c += warp_threads) {
        sum += double{of[c].sum} * detail::power_of_two(of[c].exponent - exponent);
      }
      return {exponent, block.warp_reduce(sum, plus{}) + std::exp2(sink - double{exponent})};
    } else {
      float sum = 0;
      for (index_t c = lane_of(block); checked && c < count; c += warp_threads) sum += of[c].sum;
      sum = block.warp_reduce(sum, plus{});
      return {0, sum < infinity ? 1.0 : 0.0};
    }
  }
};

/// Calls f with the number of rows of a tile as a constant: 1, or `Most` if rows > 1.
template <int Most, class F>
[[nodiscard]] status with_tile(index_t rows, const F& f) noexcept {
  if (rows <= 1) return f(std::integral_constant<int, 1>{});
  return f(std::integral_constant<int, Most>{});
}

/// The number of lanes that read a key together, where it matters little.
inline constexpr int any_lanes = 16;

/// Calls f with the number of lanes that share a key, as a constant: 8 if 8 slots hold a whole key,
/// otherwise any_lanes.
template <class Query, class Keys, class F>
[[nodiscard]] status with_lanes(const query_layer<Query, Keys>& layer, const F& f) noexcept {
  if (layer.head_dim() <= 8 * key_reader<Keys>::width) {
    return f(std::integral_constant<int, 8>{});
  }
  return f(std::integral_constant<int, any_lanes>{});
}
template <class Row, class Memory, class F>
[[nodiscard]] status with_lanes(const row_layer<Row, Memory>&, const F& f) noexcept {
  return f(std::integral_constant<int, any_lanes>{});
}

/// Runs statistics_body with as many rows and lanes as suit the layer. O(q_heads * rows * tokens *
/// head_dim)
template <class Backend, class Layer>
[[nodiscard]] status read_chunks(const Backend& exec, const Layer& layer, index_t window,
                                 index_t row, index_t rows, index_t sinks, index_t chunks,
                                 chunk_statistics* statistics) noexcept {
  const index_t wanted = layer.q_heads() / layer.kv_heads() * rows;
  const auto run = [&](auto tile) {
    return with_lanes(layer, [&](auto lanes) {
      const row_parts cut =
          row_parts::of_chunks(kv_head_items(layer) * row_tiles<tile()>(wanted), chunks);
      const statistics_body<Layer, tile(), lanes()> body{scaled(layer), window, row, rows,
                                                         sinks,         chunks, cut, statistics};
      return run_blocks(exec, cut.items(), body);
    });
  };
  return wanted <= few_rows<Layer> ? with_tile<few_rows<Layer>>(wanted, run)
                                   : with_tile<most_rows<Layer>>(wanted, run);
}

}  // namespace refreekv::inline v0::cuda_detail
