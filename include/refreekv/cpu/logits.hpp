// SPDX-License-Identifier: Apache-2.0
// Logits of a query window against one chunk of keys, for any key type and layout.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "refreekv/attention/observe.hpp"
#include "refreekv/backend/logit.hpp"
#include "refreekv/core/workspace.hpp"
#include "refreekv/cpu/key_reader.hpp"
#include "refreekv/cpu/simd/token_lanes.hpp"

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

/// The packed queries of one KV head [q_head of the KV head, row, head_dim].
struct packed_queries {
  void* data;
  bool many;  ///< are_many of the sequence's rows in the window, of which these may be a part
};

/// The packed queries of one KV head, and their attention parameters.
template <class Product>
struct head_queries {
  packed_queries packed;
  index_t first_head, heads;  ///< first q_head of the KV head; q_heads per KV head
  index_t head_dim;
  float scale;
  const attention_params<>& attention;
};

template <class Query, class Keys>
[[nodiscard]] auto queries_of(const query_layer<Query, Keys>& layer, index_t kv_head,
                              packed_queries packed) noexcept {
  const index_t heads = layer.q_heads() / layer.kv_heads();
  return head_queries<product_of<query_layer<Query, Keys>>>{
      packed, kv_head * heads, heads, layer.head_dim(), layer.scale(), layer.info.attention};
}

/// Returns the size in bytes of whole cache lines that hold `bytes`. Capped near 2^62, so that an
/// index_t holds the result; the arena refuses that size.
[[nodiscard]] inline index_t whole_lines(std::uint64_t bytes) noexcept {
  constexpr std::uint64_t most = std::uint64_t{1} << 62;
  return static_cast<index_t>((std::min)(bytes, most) / arena::alignment + 1) *
         static_cast<index_t>(arena::alignment);
}
/// Returns whole_lines of an array.
template <class T, class... Extents>
[[nodiscard]] index_t lines_of(Extents... extents) noexcept {
  arena count;
  (void)count.array<T>(extents...);
  return whole_lines(count.bytes());
}

/// Returns the bytes of the packed queries of one KV head with `rows` rows, few or many.
template <class Product>
[[nodiscard]] index_t packed_bytes(index_t rows, index_t head_dim) noexcept {
  const index_t few = lines_of<typename Product::packed>(rows, packed_dim<Product>(head_dim));
  const index_t many = lines_of<float>((rows + block_rows - 1) / block_rows, block_rows, head_dim);
  return (std::max)(few, many);
}

/// Returns the bytes of store_logits' scratch.
template <class Key>
[[nodiscard]] index_t gathered_bytes(index_t head_dim) noexcept {
  return lines_of<float>(transposed_dim<Key>(head_dim), block_tokens);
}

/// As store_logits, for many rows.
template <bool pairs, class Key>
void store_logits_of_many(const chunk_addresses<Key>& keys, const float* queries, index_t rows,
                          index_t head_dim, float scale, float* block, float* values,
                          index_t stride) noexcept {
  const index_t width = lanes_of<pairs>(head_dim);
  for (index_t t = 0; t < keys.count(); t += block_tokens) {
    const auto from = keys.from(t);
    const Key* at[std::size_t{block_tokens}];
    for (index_t i = 0; i < block_tokens; ++i) {
      at[i] = from.current[(std::min)(i, keys.count() - t - 1)];
    }
    if (keys.dim_stride() == 1) {
      for (index_t i = 0; i < (std::min)(block_tokens, keys.count() - t); ++i) {
        constexpr index_t line = 64 / sizeof(Key);
        for (index_t d = 0; d < head_dim; d += line) prefetch(from.prefetch_far[i] + d);
      }
    }
    transpose_keys<pairs>(at, keys.dim_stride(), head_dim, block);
    for (index_t r = 0; r < rows; r += block_rows) {
      multiply_block<pairs>(queries + r * width, block, width, scale,
                            (std::min)(rows - r, block_rows), values + r * stride + t, stride);
    }
  }
}

/// Writes values [row, stride] = scale * queries [row, head_dim] . keys [token, head_dim]. Rows of
/// a window with many rows are multiplied in blocks; so each row's bits depend on it alone. Uses
/// gathered [gathered_bytes]. Writes up to block_tokens - 1 results past the last token. O(rows *
/// tokens * head_dim).
template <class Product, class Key>
void store_logits(const chunk_addresses<Key>& keys, packed_queries packed, index_t rows,
                  index_t head_dim, float scale, void* gathered, float* values,
                  index_t stride = tile_stride) noexcept {
  if (packed.many) {
    store_logits_of_many<in_pairs<Product>>(keys, static_cast<const float*>(packed.data), rows,
                                            head_dim, scale, static_cast<float*>(gathered), values,
                                            stride);
    return;
  }
  const auto* queries = static_cast<const typename Product::packed*>(packed.data);
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
  Key* copy = fits ? nearby : static_cast<Key*>(gathered);
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

/// Packs the last `window` queries of one query head, as rows of its KV head.
template <class Query, class Keys>
void pack_queries(const query_layer<Query, Keys>& layer, index_t sequence, index_t q_head,
                  index_t window, packed_queries packed) noexcept {
  using few = product_of<query_layer<Query, Keys>>;
  const index_t heads = layer.q_heads() / layer.kv_heads(), rows = heads * window;
  for (index_t r = 0; r < window; ++r) {
    const Query* query = layer.queries.at(sequence, layer.window() - window + r, q_head);
    const index_t stride = layer.queries.stride(3), row = q_head % heads * window + r;
    if (!packed.many) {
      pack<few>(query, stride, layer.head_dim(), row, rows,
                static_cast<typename few::packed*>(packed.data));
    } else {
      pack_in_blocks<in_pairs<few>>(query, stride, layer.head_dim(), row, rows,
                                    static_cast<float*>(packed.data));
    }
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
