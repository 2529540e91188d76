// SPDX-License-Identifier: Apache-2.0
// Unnormalised attention of the query window to one chunk; each row has its own exponent.
#pragma once

#include "refreekv/cpu/logits.hpp"
#include "refreekv/cpu/simd/matrix.hpp"
#include "refreekv/cpu/simd/statistics.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Whether a layer has keys and queries, not ready attention rows.
template <class Layer>
concept has_queries = requires(const Layer& layer) { layer.queries; };

/// The arrays that one worker writes to.
struct tile_scratch {
  float* values;                 ///< [q_head of the KV head, window, tile_stride]
  chunk_statistics* statistics;  ///< [q_head of the KV head, window]
  void* gathered;                ///< [gathered_bytes]
  float* unpacked;               ///< [chunk_tokens, head_dim]; unused if keys are read in place
};

/// The tiles of all workers, in whole cache lines each.
struct worker_tiles {
  tile_scratch first;
  index_t values, statistics, gathered, unpacked;  ///< elements of a worker; bytes of `gathered`

  /// `rows`: rows of all query heads of a KV head. `value_rows`: rows of `values`; 0 where these
  /// are elsewhere.
  template <class Layer>
  static worker_tiles carve(arena& from, index_t workers, index_t rows, index_t value_rows,
                            const Layer& layer) noexcept {
    worker_tiles w{};
    w.values = lines_of<float>(value_rows, tile_stride) / index_t{sizeof(float)};
    w.statistics = whole_registers(rows);  // 16 of 12 bytes fill whole lines
    if constexpr (has_queries<Layer>) {
      w.gathered = gathered_bytes<multiplied_key<std::remove_cvref_t<decltype(layer.keys)>>>(
          layer.head_dim());
      if constexpr (packed_keys<std::remove_cvref_t<decltype(layer.keys)>>) {
        w.unpacked = whole_registers(chunk_tokens * layer.head_dim());
      }
    }
    w.first.values = from.array<float>(workers, w.values);
    w.first.statistics = from.array<chunk_statistics>(workers, w.statistics);
    w.first.gathered = from.array<std::byte>(workers, w.gathered);
    w.first.unpacked = from.array<float>(workers, w.unpacked);
    return w;
  }

  [[nodiscard]] tile_scratch of(index_t worker) const noexcept {
    return {first.values + worker * values, first.statistics + worker * statistics,
            static_cast<std::byte*>(first.gathered) + worker * gathered,
            first.unpacked + worker * unpacked};
  }
};

/// Returns whether each row sees all tokens of a chunk, and the logits are scaled products only.
inline bool is_plain(const attention_params<>& params, const query_window& window,
                     token_range tokens) noexcept {
  return window.all_see(tokens) && !(params.soft_cap > 0) && params.alibi_slopes.data() == nullptr;
}

/// Writes the statistics of a chunk's few rows, and no values. Returns false if `attend` must
/// compute them instead. The exponentials overlap with reading the keys.
template <class Product, class Key>
bool summarise(const head_queries<Product>& queries, const query_window& window, token_range tokens,
               const chunk_addresses<Key>& keys, const tile_scratch& tile) noexcept {
  const index_t rows = queries.heads * window.rows, head_dim = queries.head_dim;
  if (queries.packed.many || keys.count() == 0 || keys.count() % tile_tokens != 0 ||
      keys.dim_stride() != 1 || !is_plain(queries.attention, window, tokens)) {
    return false;
  }
  const float scale = queries.scale;
  auto at = keys.from(0);
  bool fit = true;
  const auto* packed = static_cast<const typename Product::packed*>(queries.packed.data);
  for_each_tile<Product>(packed, rows, head_dim, [&](auto n, index_t row, const auto* q) {
    running_statistics running[std::size_t{result_registers(n())}];
    dot_rows<Product, n()>(q, at, keys.count(), head_dim,
                           [&](index_t i, index_t t, const lanes& x) {
                             const lanes logits = x * scale;
                             if (t == 0) {
                               running[i].start(logits);
                             } else {
                               running[i].add(logits);
                             }
                           });
    for (index_t i = 0; i < result_registers(n()); ++i) {
      const index_t first = i * rows_a_register;
      fit &= running[i].finish((std::min)(n() - first, rows_a_register),
                               tile.statistics + row + first);
    }
    at.prefetch_near = at.prefetch_far = at.current;
  });
  return fit;
}

/// Writes the logits of a chunk to the tile's values: -inf if a row does not see the token or does
/// not exist.
template <class Product, class Key>
void fill_logits(const head_queries<Product>& queries, const query_window& window,
                 token_range tokens, const chunk_addresses<Key>& keys,
                 const tile_scratch& tile) noexcept {
  const index_t rows = queries.heads * window.rows;
  store_logits<Product>(keys, queries.packed, rows, queries.head_dim, queries.scale, tile.gathered,
                        tile.values);
  for (index_t i = 0; i < rows; ++i) {
    float* values = tile.values + i * tile_stride;
    const index_t row = i % window.rows;
    if (row < window.first_row()) {
      std::fill(values, values + keys.count(), -std::numeric_limits<float>::infinity());
    } else {
      finish_logits(queries.attention, window, queries.first_head + i / window.rows, row, tokens,
                    values);
    }
  }
}

/// Writes the values and statistics of a chunk. A row that does not exist sees no token.
template <tiny_values tiny = tiny_values::raised, class Product, class Key>
void attend(const head_queries<Product>& queries, const query_window& window, token_range tokens,
            const chunk_addresses<Key>& keys, const tile_scratch& tile) noexcept {
  const index_t rows = queries.heads * window.rows;
  fill_logits(queries, window, tokens, keys, tile);
  for (index_t i = 0; i < rows; ++i) {
    tile.statistics[i].exponent = exponent_of(tile.values + i * tile_stride, keys.count());
  }
  for (index_t i = 0; i < rows; ++i) {
    tile.statistics[i] = exponentiate<tiny>(tile.values + i * tile_stride, keys.count(),
                                            tile.statistics[i].exponent);
  }
}

/// As `attend` of queries, but for ready rows: values are attention / 2^exponent.
template <class Row>
void attend(const row_layer<Row>& layer, const query_window& window, const chunk_place& block,
            const tile_scratch& tile) noexcept {
  const index_t heads = layer.q_heads() / layer.kv_heads();
  const index_t stride = layer.rows.stride(3);
  const auto [begin, end] = block.tokens;
  for (index_t i = 0; i < heads * window.rows; ++i) {
    const index_t row = i % window.rows;
    Eigen::Map<Eigen::ArrayXf> x(tile.values + i * tile_stride,
                                 static_cast<Eigen::Index>(end - begin));
    x.setZero();
    float peak = 0;
    if (row >= window.first_row()) {
      const Row* attention = layer.rows.at(block.sequence, layer.window() - window.rows + row,
                                           block.kv_head * heads + i / window.rows);
      const token_range visible = window.visible(row);
      for (index_t t = (std::max)(begin, visible.begin); t < (std::min)(end, visible.end); ++t) {
        float& value = x(static_cast<Eigen::Index>(t - begin));
        value = widen(attention[t * stride]);
        peak = (std::max)(peak, value);
      }
    }
    chunk_statistics& s = tile.statistics[i];
    s = {0, 0, 0};
    if (peak > 0 && std::isfinite(peak)) {
      s.exponent = static_cast<float>(std::ilogb(peak));
      x = (x.template cast<double>() / detail::power_of_two(s.exponent)).template cast<float>();
    }
    if (begin < end) {
      s.sum = x.sum();
      s.sum_squares = x.square().sum();
    }
    // Only for a sum of 0: a NaN sum keeps its exponent, because NaN has no peak.
    if (s.sum <= 0 && s.sum >= 0) s.exponent = -std::numeric_limits<float>::infinity();
  }
}

/// What attend_chunk writes to a tile.
enum class output {
  statistics,    ///< statistics, no values
  values,        ///< values and statistics
  exact_values,  ///< values down to tiny_values::exact, and statistics without squares
};

/// Attends with a window's rows of one KV head to a chunk of its keys, and writes what `wanted`
/// names to the tile. `packed`: the rows' queries; unused for ready rows. Prefetches keys of the
/// chunk `next`.
template <class Layer>
void attend_chunk(const Layer& layer, const query_window& window, packed_queries packed,
                  const chunk_place& chunk, const chunk_place& next, output wanted,
                  const tile_scratch& tile) noexcept {
  if constexpr (has_queries<Layer>) {
    const auto keys = read_keys(layer.keys, chunk, next, tile.unpacked);
    const auto queries = queries_of(layer, chunk.kv_head, packed);
    if (wanted == output::exact_values) {
      attend<tiny_values::exact>(queries, window, chunk.tokens, keys, tile);
    } else if (wanted == output::values || !summarise(queries, window, chunk.tokens, keys, tile)) {
      attend(queries, window, chunk.tokens, keys, tile);
    }
  } else {
    attend(layer, window, chunk, tile);
  }
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
