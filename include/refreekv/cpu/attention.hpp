// SPDX-License-Identifier: Apache-2.0
// Unnormalised attention of the query window to one chunk; each row has its own exponent.
#pragma once

#include "refreekv/cpu/logits.hpp"
#include "refreekv/cpu/simd/statistics.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// The arrays that one worker writes to.
struct tile_scratch {
  float* values;                 ///< [q_head of the KV head, window, tile_stride]
  chunk_statistics* statistics;  ///< [q_head of the KV head, window]
  void* gathered;                ///< [tile_tokens, head_dim] of the multiplied keys' type
  float* unpacked;               ///< [chunk_tokens, head_dim]; unused if keys are read in place
};

/// Returns whether each row sees all tokens of a chunk, and the logits are scaled products only.
inline bool is_plain(const attention_params<>& params, const query_window& window,
                     token_range tokens) noexcept {
  return window.all_see(tokens) && !(params.soft_cap > 0) && params.alibi_slopes.data() == nullptr;
}

/// Writes the statistics of a chunk's rows, and no values. Returns false if `attend` must compute
/// them instead. The exponentials overlap with reading the keys.
template <class Product, class Key>
bool summarise(const head_queries<Product>& queries, const query_window& window, token_range tokens,
               const chunk_addresses<Key>& keys, const tile_scratch& tile) noexcept {
  if (keys.count() == 0 || keys.count() % tile_tokens != 0 || keys.dim_stride() != 1 ||
      !is_plain(queries.attention, window, tokens)) {
    return false;
  }
  const index_t rows = queries.heads * window.rows, head_dim = queries.head_dim;
  const float scale = queries.scale;
  auto at = keys.from(0);
  bool fit = true;
  for_each_tile<Product>(queries.packed, rows, head_dim, [&](auto n, index_t row, const auto* q) {
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
  store_logits<Product>(keys, queries.packed, rows, queries.head_dim, queries.scale,
                        static_cast<Key*>(tile.gathered), tile.values);
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
template <class Product, class Key>
void attend(const head_queries<Product>& queries, const query_window& window, token_range tokens,
            const chunk_addresses<Key>& keys, const tile_scratch& tile) noexcept {
  const index_t rows = queries.heads * window.rows;
  fill_logits(queries, window, tokens, keys, tile);
  for (index_t i = 0; i < rows; ++i) {
    tile.statistics[i].exponent = exponent_of(tile.values + i * tile_stride, keys.count());
  }
  for (index_t i = 0; i < rows; ++i) {
    tile.statistics[i] =
        exponentiate(tile.values + i * tile_stride, keys.count(), tile.statistics[i].exponent);
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

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
