// SPDX-License-Identifier: Apache-2.0
// Logits of a query window against one chunk of keys, for any key type and layout.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "refreekv/attention/observe.hpp"
#include "refreekv/backend/logit.hpp"
#include "refreekv/cpu/key_reader.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Distance between rows of a tile, in floats. Not a power of two: rows would then compete for the
/// same cache sets, with each other and with keys.
inline constexpr index_t tile_stride = chunk_tokens + 16;

/// How the queries and keys of a layer are multiplied.
template <class Layer>
struct product_of_layer;
template <class Query, class Keys>
struct product_of_layer<query_layer<Query, Keys>> {
  static_assert(key_in_place<Keys> || packed_keys<Keys>,
                "keys are float, half or bfloat16 (Eigen's types, f16_bits or bf16_bits), "
                "scaled_keys of int8 or fp8, block_keys or int4_keys");
  using type = product<Query, multiplied_key<Keys>>;
};
template <class Layer>
using product_of = typename product_of_layer<Layer>::type;

/// The packed queries of one KV head, and their attention parameters.
template <class Product>
struct head_queries {
  const typename Product::packed* packed;  ///< [q_head of the KV head, window, packed_dim]
  index_t first_head, heads;               ///< first q_head of the KV head; q_heads per KV head
  index_t head_dim;
  float scale;
  const attention_params<>& attention;
};

template <class Query, class Keys>
[[nodiscard]] auto queries_of(
    const query_layer<Query, Keys>& layer, index_t kv_head,
    const typename product_of<query_layer<Query, Keys>>::packed* packed) noexcept {
  const index_t heads = layer.q_heads() / layer.kv_heads();
  return head_queries<product_of<query_layer<Query, Keys>>>{
      packed, kv_head * heads, heads, layer.head_dim(), layer.scale(), layer.info.attention};
}

/// Writes values [row, stride] = scale * queries [row, packed_dim] . keys [token, head_dim]. Uses
/// gathered [tile_tokens, head_dim] if dimensions are not contiguous and head_dim is large. Writes
/// up to three results past the last token. O(rows * tokens * head_dim).
template <class Product, class Key>
void store_logits(const chunk_addresses<Key>& keys, const typename Product::packed* queries,
                  index_t rows, index_t head_dim, float scale, Key* gathered, float* values,
                  index_t stride = tile_stride) noexcept {
  const auto multiply = [&](key_addresses<Key> at, index_t start, index_t count) {
    for_each_tile<Product>(queries, rows, head_dim, [&](auto n, index_t row, const auto* tile) {
      dot_rows<Product, n()>(tile, at, count, head_dim, [&](index_t i, index_t t, const lanes& x) {
        float results[lane_count];
        store(x * scale, results);
        const index_t first = i * rows_a_register;
        for (index_t r = first; r < (std::min)(first + rows_a_register, n()); ++r) {
          std::memcpy(values + (row + r) * stride + start + t, results + (r - first) * tile_tokens,
                      sizeof(float[4]));
        }
      });
      at.prefetch_near = at.prefetch_far =
          at.current;  // the first tile fetches the keys for all tiles
    });
  };
  if (keys.dim_stride() == 1) {
    multiply(keys.from(0), 0, keys.count());
    return;
  }
  // In a token-contiguous layout, neighbours in memory are the same dimension of other tokens.
  // Tokens that share a cache line are gathered together, as many as there is room for.
  constexpr index_t line = 64 / sizeof(Key), room = line * 256;
  Key nearby[std::size_t{room}];
  const bool fits = tile_tokens * head_dim <= room;
  Key* copy = fits ? nearby : gathered;
  const index_t together =
      fits ? (std::min)(line, room / head_dim / tile_tokens * tile_tokens) : tile_tokens;
  const Key* copies[std::size_t{line}];
  for (index_t i = 0; i < together; ++i) copies[i] = copy + i * head_dim;
  for (index_t t = 0; t < keys.count(); t += together) {
    const index_t tiles = (keys.count() - t + tile_tokens - 1) / tile_tokens;
    const index_t count = (std::min)(together, tiles * tile_tokens);
    const Key* const* from = keys.from(t).current;
    for (index_t d = 0; d < head_dim; ++d) {
      constexpr index_t prefetch_near = 16;  // dimensions
      if (d + prefetch_near < head_dim) prefetch(from[0] + (d + prefetch_near) * keys.dim_stride());
      for (index_t i = 0; i < count; ++i) copy[i * head_dim + d] = from[i][d * keys.dim_stride()];
    }
    multiply({copies, copies, copies}, t, count);
  }
}

/// Packs the last `window` queries of one query head into packed [q_head of the KV head, window,
/// packed_dim].
template <class Query, class Keys>
void pack_queries(const query_layer<Query, Keys>& layer, index_t sequence, index_t q_head,
                  index_t window,
                  typename product_of<query_layer<Query, Keys>>::packed* packed) noexcept {
  const index_t heads = layer.q_heads() / layer.kv_heads();
  for (index_t r = 0; r < window; ++r) {
    pack<product_of<query_layer<Query, Keys>>>(
        layer.queries.at(sequence, layer.window() - window + r, q_head), layer.queries.stride(3),
        layer.head_dim(), q_head % heads * window + r, heads * window, packed);
  }
}

/// Replaces each x of logits [count] by cap * tanh(x / cap). Requires count <= chunk_tokens.
inline void apply_soft_cap(float* logits, index_t count, double cap) noexcept {
  const auto size = static_cast<Eigen::Index>(count);
  double e[static_cast<std::size_t>(chunk_tokens)];
  Eigen::Map<Eigen::ArrayXd>(e, size) =
      (Eigen::Map<const Eigen::ArrayXf>(logits, size).cast<double>() * (2 / cap)).exp();
  for (index_t t = 0; t < count; ++t)
    logits[t] = detail::soft_capped(logits[t], cap, 1 / cap, e[t]);
}

/// Turns the scaled q.k of one row into logits: adds soft cap and ALiBi, and writes -inf for tokens
/// that the row does not see.
inline void finish_logits(const attention_params<>& params, const query_window& window,
                          index_t q_head, index_t row, token_range range, float* logits) noexcept {
  const index_t count = range.end - range.begin;
  if (params.soft_cap > 0) apply_soft_cap(logits, count, static_cast<double>(params.soft_cap));
  const token_range visible = window.visible(row);
  if (params.alibi_slopes.data() != nullptr) {
    const auto slope = static_cast<double>(params.alibi_slopes(q_head));
    const index_t position = window.position + row;
    for (index_t t = range.begin; t < range.end; ++t) {
      float& logit = logits[t - range.begin];
      logit = detail::with_alibi(logit, slope, t - position);
    }
  }
  const float hidden = -std::numeric_limits<float>::infinity();
  const index_t first = std::clamp(visible.begin, range.begin, range.end) - range.begin;
  const index_t last = std::clamp(visible.end, range.begin, range.end) - range.begin;
  std::fill(logits, logits + first, hidden);
  std::fill(logits + last, logits + count, hidden);
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
