// SPDX-License-Identifier: Apache-2.0
// Inputs of policy::faithful's primitives on the CPU: rows of a cache, and the query rows of a
// window.
#pragma once

#include "refreekv/backend/importance.hpp"
#include "refreekv/cpu/simd/matrix.hpp"
#include "refreekv/cpu/token_scores.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Writes a row of a cache as floats to row [head_dim]; dim_stride is in elements.
template <class T>
void widen_row(const T* from, index_t dim_stride, index_t dims, float* row) noexcept {
  if (dim_stride == 1) {
    for (index_t d = 0; d < dims; ++d) row[d] = widen(from[d]);
  } else {
    for (index_t d = 0; d < dims; ++d) row[d] = widen(from[d * dim_stride]);
  }
}

/// Calls f(token, row) for the `tokens` of one head. `row` holds the token's row [head_dim] as
/// floats, followed by zeros up to whole_registers(head_dim).
template <kv_source Source, class F>
void for_each_row(const Source& source, index_t sequence, index_t kv_head, token_range tokens,
                  float* row, const F& f) noexcept {
  const index_t dims = source.shape().head_dim;
  std::fill(row + dims, row + whole_registers(dims), 0.0f);
  for_each_row_at(source, sequence, kv_head, tokens,
                  [&](index_t t, const auto* from, index_t dim_stride) {
                    widen_row(from, dim_stride, dims, row);
                    f(t, row);
                  });
}

/// Returns the length of a row of whole_registers(dims) floats. It is finite for all finite floats.
[[nodiscard]] inline double length_of_row(const float* row, index_t dims) noexcept {
  return std::sqrt(wide_dot(row, row, dims));
}

/// The plain layer, and how its keys and queries are multiplied.
template <class Layer>
using plain_layer = std::remove_cvref_t<decltype(detail::plain(std::declval<const Layer&>()))>;
template <class Layer>
using plain_product = product_of<plain_layer<Layer>>;
template <class Layer>
using plain_keys = std::remove_cvref_t<decltype(std::declval<plain_layer<Layer>>().keys)>;

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

/// Returns the attention cost of one token, in elements: two products with the rows of a KV head.
template <class Layer>
[[nodiscard]] index_t attention_work(const Layer& layer, index_t rows) noexcept {
  const index_t group = layer.q_heads() / layer.kv_heads();
  return (std::min)(rows, layer.capacity()) * group * layer.head_dim() / 8;
}

/// The existing query rows of one KV head's window, packed, with their normalisers.
template <class Product>
struct head_rows {
  query_window window;
  head_queries<Product> queries;
  const row_normaliser* normalisers;  ///< [q_head of the KV head, row]

  [[nodiscard]] index_t count() const noexcept { return queries.heads * window.rows; }

  /// Writes the bare logits of a chunk to the tile: with the soft cap, but no mask and no position.
  template <class Key>
  void fill_bare_logits(const chunk_addresses<Key>& keys, const tile_scratch& tile,
                        index_t stride = tile_stride) const noexcept {
    store_logits<Product>(keys, queries.packed, count(), queries.head_dim, queries.scale,
                          tile.gathered, tile.values, stride);
    const float cap = queries.attention.soft_cap;
    for (index_t i = 0; cap > 0 && i < count(); ++i) {
      apply_soft_cap(tile.values + i * stride, keys.count(), static_cast<double>(cap));
    }
  }

  /// Turns the bare logits [tokens] of row i into its attention.
  void attend(index_t i, token_range tokens, float* logits) const noexcept {
    attention_params<> params = queries.attention;
    params.soft_cap = 0;  // already in the bare logits
    const index_t q_head = queries.first_head + i / window.rows, count = tokens.end - tokens.begin;
    finish_logits(params, window, q_head, i % window.rows, tokens, logits);
    const row_normaliser& row = normalisers[i];
    // A sink's logit may be so large that no token's value is within reach of its exponent.
    if (std::abs(row.exponent) < exponent_limit && params.sink_logits.data() == nullptr) {
      attend_in_units(logits, count, row);
    } else {
      const float exponent = exponent_of(logits, count);
      exponentiate(logits, count, exponent);
      normalise_values(logits, count, exponent, row);
    }
    const token_range visible = window.visible(i % window.rows);
    const index_t from = std::clamp(visible.begin, tokens.begin, tokens.end) - tokens.begin;
    const index_t to = std::clamp(visible.end, tokens.begin, tokens.end) - tokens.begin;
    std::fill(logits, logits + from, 0.0f);
    std::fill(logits + to, logits + count, 0.0f);
  }

  /// Turns logits [whole registers] into attention, at least 2^-62 times that of the row's largest.
  /// Requires |exponent| < exponent_limit.
  static void attend_in_units(float* logits, index_t count, const row_normaliser& row) noexcept {
    const lanes lowest = splat((row.exponent + lowest_power) * std::numbers::ln2_v<float>);
    const lanes exponent = splat(row.exponent + integer_shift);
    const lanes share = splat(static_cast<float>(1 / row.sum));
    for (index_t t = 0; t < count; t += lane_count) {
      store(exponential(larger(load(logits + t), lowest), exponent) * share, logits + t);
    }
  }
};

/// Scratch of policy::faithful's primitives.
struct importance_scratch {
  row_normaliser* normalisers;  ///< [sequence, q_head, rows]: written by weigh_tokens
  double* errors;               ///< [sequence, kv_head, sizes + 1]; null without an error term
  std::byte* memory;            ///< of all workers, or sorted scores [sequence, kv_head, capacity]
  index_t worker_bytes;

  struct weighing_parts {
    void* packed;  ///< [packed_bytes]
    tile_scratch tile;
    chunk_statistics* statistics;  ///< [q_head of the KV head, rows, chunk]
    float* row;                    ///< [whole_registers of the larger head_dim]
    double* anchor;                ///< [whole_registers of the head_dim]
  };

  template <class Layer>
  static weighing_parts carve_weighing(arena& from, const importance_rule& rule,
                                       const Layer& layer) noexcept {
    using product = plain_product<Layer>;
    const index_t heads = layer.q_heads() / layer.kv_heads(), dims = layer.head_dim();
    weighing_parts p{};
    p.packed = from.array<std::byte>(packed_bytes<product>(heads * rule.rows, dims));
    p.tile.gathered =
        from.array<std::byte>(gathered_bytes<multiplied_key<plain_keys<Layer>>>(dims));
    p.tile.values = from.array<float>(heads, rule.rows, tile_stride);
    p.tile.statistics = from.array<chunk_statistics>(heads, rule.rows);
    p.statistics =
        from.array<chunk_statistics>(heads, rule.rows, chunking{layer.capacity(), 0}.count());
    p.row = from.array<float>(whole_registers((std::max)(dims, layer.values.shape().head_dim)));
    p.anchor = from.array<double>(whole_registers(dims));
    return p;
  }
  template <class Layer>
  [[nodiscard]] weighing_parts weighing(index_t worker, const importance_rule& rule,
                                        const Layer& layer) const noexcept {
    arena carve(memory + worker * worker_bytes);
    return carve_weighing(carve, rule, layer);
  }

  /// Packs the existing rows of a KV head into `packed`, and returns them.
  template <class Layer>
  [[nodiscard]] auto pack_head(const importance_rule& rule, const Layer& layer, index_t sequence,
                               index_t kv_head, void* packed) const noexcept {
    using product = plain_product<Layer>;
    const auto& plain = detail::plain(layer);
    const query_window all = window_of(plain, sequence, rule.rows);
    const index_t heads = layer.q_heads() / layer.kv_heads(), rows = all.count();
    // Multiplied as few rows are: sums over lanes round less than those along head_dim, and what is
    // fitted to logits amplifies their rounding.
    const packed_queries queries{packed, false};
    for (index_t g = 0; g < heads; ++g) {
      pack_queries(plain, sequence, kv_head * heads + g, rows, queries);
    }
    return head_rows<product>{all.part(all.first_row(), rows), queries_of(plain, kv_head, queries),
                              normalisers_of(rule, layer, sequence, kv_head)};
  }

  template <class Layer>
  [[nodiscard]] row_normaliser* normalisers_of(const importance_rule& rule, const Layer& layer,
                                               index_t sequence, index_t kv_head) const noexcept {
    const index_t heads = layer.q_heads() / layer.kv_heads();
    return normalisers + (sequence * layer.kv_heads() + kv_head) * heads * rule.rows;
  }
};

/// Calls f(chunk number, chunk, next chunk) for the tokens that any row of a window sees.
template <class F>
void for_each_chunk(const query_window& window, index_t sequence, index_t kv_head,
                    const F& f) noexcept {
  const index_t begin = importance_rule::seen_by(window).begin;
  const chunking chunks{window.tokens, 0};
  const auto block_of = [&](index_t c) {
    const token_range chunk = chunks[c];
    return chunk_place{sequence, kv_head, {(std::max)(begin, chunk.begin), chunk.end}};
  };
  for (index_t c = chunks.of(begin); c < chunks.count(); ++c) {
    f(c, block_of(c), block_of((std::min)(c + 1, chunks.count() - 1)));
  }
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
