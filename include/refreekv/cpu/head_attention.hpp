// SPDX-License-Identifier: Apache-2.0
// Attention of one KV head's query heads to all of its tokens, tile by tile.
#pragma once

#include "refreekv/backend/token_scores.hpp"
#include "refreekv/cpu/scan_scratch.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Query rows, over all query heads of a KV head, that are processed together. Their tile stays in
/// the second-level cache.
inline constexpr index_t rows_together = 64;

/// Returns the size in bytes of whole cache lines that hold `bytes`. Capped near 2^62, so that an
/// index_t holds the result; the arena refuses that size.
[[nodiscard]] inline index_t whole_lines(std::uint64_t bytes) noexcept {
  constexpr std::uint64_t most = std::uint64_t{1} << 62;
  return static_cast<index_t>((std::min)(bytes, most) / arena::alignment + 1) *
         static_cast<index_t>(arena::alignment);
}

/// Scratch of each worker: 70 KB of logits, the queries of rows_together rows, statistics of the
/// longest sequence, and a chunk of floats for packed keys.
struct attention_scratch {
  std::byte* memory;
  index_t worker_bytes;
  index_t rows;    ///< rows of each query head that are processed together
  double* totals;  ///< [sequence, kv_head, 2]

  struct parts {
    void* packed;  ///< [q_head of the KV head, rows, packed_dim]
    tile_scratch tile;
    chunk_statistics* statistics;  ///< [q_head of the KV head, rows, chunk]
    row_normaliser* normalisers;   ///< [q_head of the KV head, rows]
    double* sums;                  ///< [2, q_head of the KV head, capacity]
  };

  template <class Layer>
  static parts carve_parts(arena& from, index_t rows, const Layer& layer) noexcept {
    const index_t heads = layer.q_heads() / layer.kv_heads();
    const index_t chunks = chunking{layer.capacity(), 0}.count();
    parts p{};
    if constexpr (has_queries<Layer>) {
      using product = product_of<Layer>;
      using keys = std::remove_cvref_t<decltype(layer.keys)>;
      const index_t dim = layer.head_dim();
      p.packed = from.array<typename product::packed>(heads, rows, packed_dim<product>(dim));
      p.tile.gathered = from.array<std::byte>(tile_tokens, dim, index_t{sizeof(float)});
      if constexpr (packed_keys<keys>) p.tile.unpacked = from.array<float>(chunk_tokens, dim);
    }
    p.tile.values = from.array<float>(heads, rows, tile_stride);
    p.tile.statistics = from.array<chunk_statistics>(heads, rows);
    p.statistics = from.array<chunk_statistics>(heads, rows, chunks);
    p.normalisers = from.array<row_normaliser>(heads, rows);
    p.sums = from.array<double>(2, heads, layer.capacity());
    return p;
  }

  template <class Layer>
  static attention_scratch carve(arena& from, index_t workers, index_t window,
                                 const Layer& layer) noexcept {
    const index_t heads = layer.q_heads() / layer.kv_heads();
    const index_t most = heads < rows_together ? rows_together / heads : 1;
    attention_scratch s{nullptr, 0, (std::min)(window, most), nullptr};
    arena count;
    (void)carve_parts(count, s.rows, layer);
    s.worker_bytes = whole_lines(count.bytes());
    s.memory = from.array<std::byte>(workers, s.worker_bytes);
    s.totals = from.array<double>(layer.sequences(), layer.kv_heads(), 2);
    return s;
  }

  template <class Layer>
  [[nodiscard]] parts of(index_t worker, const Layer& layer) const noexcept {
    arena carve(memory + worker * worker_bytes);
    return carve_parts(carve, rows, layer);
  }
};

/// Returns the layer with its rows [first, first + rows) only.
template <class Query, class Keys>
[[nodiscard]] auto only_rows(const query_layer<Query, Keys>& layer, index_t first,
                             index_t rows) noexcept {
  const auto& q = layer.queries;
  query_layer<Query, Keys> part = layer;
  part.queries = view<const Query, 4>(q.at(0, first), {q.extent(0), rows, q.extent(2), q.extent(3)},
                                      {q.stride(0), q.stride(1), q.stride(2), q.stride(3)});
  return part;
}
template <class Row>
[[nodiscard]] auto only_rows(const row_layer<Row>& layer, index_t first, index_t rows) noexcept {
  const auto& a = layer.rows;
  row_layer<Row> part = layer;
  part.rows = view<const Row, 4>(a.at(0, first), {a.extent(0), rows, a.extent(2), a.extent(3)},
                                 {a.stride(0), a.stride(1), a.stride(2), a.stride(3)});
  return part;
}

/// What attend_block writes to the tile.
enum class leaves {
  statistics,  ///< statistics, no values
  values,      ///< values with their statistics
  logits,      ///< logits; requires a layer with queries
};

/// Writes statistics, values or logits of one chunk to the tile.
template <class Layer>
void attend_block(const Layer& layer, const query_window& window, const chunk_place& block,
                  const attention_scratch::parts& work, leaves output) noexcept {
  if constexpr (has_queries<Layer>) {
    const auto keys = read_keys(layer.keys, block, block, work.tile.unpacked);
    const auto queries = queries_of(
        layer, block.kv_head, static_cast<const typename product_of<Layer>::packed*>(work.packed));
    if (output == leaves::logits) {
      fill_logits(queries, window, block.tokens, keys, work.tile);
    } else if (output == leaves::values ||
               !summarise(queries, window, block.tokens, keys, work.tile)) {
      attend(queries, window, block.tokens, keys, work.tile);
    }
  } else {
    attend(layer, window, block, work.tile);
  }
}

/// Turns logits [count] of one row into attention. Attention below 1e-37 becomes 0.
inline void normalise_logits(float* logits, index_t count, const row_normaliser& row) noexcept {
  const double log_sum = row.log_sum();
  Eigen::Map<Eigen::ArrayXf> x(logits, static_cast<Eigen::Index>(count));
  if (std::isnan(log_sum)) {
    x.setConstant(std::numeric_limits<float>::quiet_NaN());
  } else {
    x = (x.cast<double>() - log_sum).cast<float>();
    x = (x < -85).select(0, x.exp());
  }
}

/// Turns values [count] of one row, relative to 2^exponent, into attention.
inline void normalise_values(float* values, index_t count, float exponent,
                             const row_normaliser& row) noexcept {
  const auto attention = static_cast<float>(detail::weight_of(exponent, row));
  Eigen::Map<Eigen::ArrayXf> x(values, static_cast<Eigen::Index>(count));
  if (exponent <= -std::numeric_limits<float>::infinity()) {
    x.setConstant(attention);  // 0, or NaN if the row has no normaliser
  } else {
    x *= attention;
  }
}

/// Returns whether all attention that a ready row sees is finite.
template <class Row>
[[nodiscard]] bool all_finite(const Row* attention, index_t stride, token_range visible) noexcept {
  bool finite = true;
  for (index_t t = visible.begin; t < visible.end; ++t) {
    finite &= std::isfinite(widen(attention[t * stride]));
  }
  return finite;
}

/// Calls f(rows, tokens, values) for all tiles of the last `window` rows of one KV head of one
/// sequence. values [q_head of the KV head, rows], with tile_stride floats between rows, is the
/// attention to `tokens`. Skips tokens that no row of a group of rows sees. Reads the keys twice
/// for each group of rows. Returns the number of rows that were left out.
template <class Layer, class F>
index_t for_each_attention(const Layer& layer, index_t sequence, index_t kv_head, index_t window,
                           bad_rows bad, const attention_scratch& scratch,
                           const attention_scratch::parts& work, const F& f) noexcept {
  const index_t heads = layer.q_heads() / layer.kv_heads();
  const query_window all = window_of(layer, sequence, window);
  index_t left_out = 0;
  for (index_t begin = all.first_row(); begin < window; begin += scratch.rows) {
    const index_t rows = (std::min)(scratch.rows, window - begin);
    const Layer part = only_rows(layer, layer.window() - window + begin, rows);
    const query_window block_window = all.part(begin, rows);
    const token_range hull = block_window.hull();
    const chunking chunks{hull.end, 0};
    const auto for_each_block = [&](const auto& g) {
      for (index_t c = 0; c < chunks.count(); ++c) {
        if (chunks[c].end > hull.begin) g(c, chunk_place{sequence, kv_head, chunks[c]});
      }
    };
    if constexpr (has_queries<Layer>) {
      using product = product_of<Layer>;
      for (index_t h = 0; h < heads; ++h) {
        for (index_t r = 0; r < rows; ++r) {
          pack<product>(part.queries.at(sequence, r, kv_head * heads + h), part.queries.stride(3),
                        layer.head_dim(), h * rows + r, heads * rows,
                        static_cast<typename product::packed*>(work.packed));
        }
      }
      for (index_t i = 0; i < heads * rows * chunks.count(); ++i) {
        work.statistics[i] = {-std::numeric_limits<float>::infinity(), 0, 0};
      }
      for_each_block([&](index_t c, const chunk_place& block) {
        attend_block(part, block_window, block, work, leaves::statistics);
        for (index_t i = 0; i < heads * rows; ++i) {
          work.statistics[i * chunks.count() + c] = work.tile.statistics[i];
        }
      });
      const auto& sinks = layer.info.attention.sink_logits;
      for (index_t i = 0; i < heads * rows; ++i) {
        work.normalisers[i] =
            detail::normalise(work.statistics + i * chunks.count(), chunks.count(),
                              sinks.data() != nullptr ? sinks(kv_head * heads + i / rows)
                                                      : -std::numeric_limits<float>::infinity());
      }
    } else {
      for (index_t i = 0; i < heads * rows; ++i) {
        const auto* row = part.rows.at(sequence, i % rows, kv_head * heads + i / rows);
        const bool exists = bad == bad_rows::stay ||
                            all_finite(row, part.rows.stride(3), block_window.visible(i % rows));
        work.normalisers[i] = {0, exists ? 1.0 : 0.0};
      }
    }
    for (index_t r = 0; bad == bad_rows::left_out && r < rows; ++r) {
      bool exists = true;
      for (index_t h = 0; h < heads; ++h) exists &= work.normalisers[h * rows + r].exists();
      if (exists) continue;
      ++left_out;
      for (index_t h = 0; h < heads; ++h) work.normalisers[h * rows + r].sum = 0;
    }
    // From exponent_limit on, logits are exact relative to their peak only.
    const bool from_logits =
        has_queries<Layer> && std::none_of(work.normalisers, work.normalisers + heads * rows,
                                           [](const row_normaliser& n) {
                                             return std::abs(n.exponent) >= exponent_limit;
                                           });
    for_each_block([&](index_t, const chunk_place& block) {
      attend_block(part, block_window, block, work, from_logits ? leaves::logits : leaves::values);
      const auto [first, last] = block.tokens;
      for (index_t i = 0; i < heads * rows; ++i) {
        float* values = work.tile.values + i * tile_stride;
        const token_range visible = block_window.visible(i % rows);
        const index_t from = std::clamp(visible.begin, first, last) - first;
        const index_t to = std::clamp(visible.end, first, last) - first;
        std::fill(values, values + from, 0.0f);
        std::fill(values + to, values + last - first, 0.0f);
        if (bad == bad_rows::left_out && !work.normalisers[i].exists()) {
          std::fill(values + from, values + to, 0.0f);
        } else if (from_logits) {
          normalise_logits(values + from, to - from, work.normalisers[i]);
        } else {
          normalise_values(values + from, to - from, work.tile.statistics[i].exponent,
                           work.normalisers[i]);
        }
      }
      f(rows, block.tokens, static_cast<const float*>(work.tile.values));
    });
  }
  return left_out;
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
