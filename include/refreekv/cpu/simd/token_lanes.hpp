// SPDX-License-Identifier: Apache-2.0
// Dot products of many query rows with keys, a token in each lane. Keys are widened and transposed
// first, which is repaid by not having to sum over lanes.
#pragma once

#include "refreekv/cpu/simd/dot_bf16.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Tokens and query rows whose sums fit in the registers together.
inline constexpr index_t block_tokens = index_t{2} * lane_count, block_rows = lane_registers / 4;

/// Whether `rows` query rows of a KV head, over all its query heads, repay transposing.
constexpr bool are_many(index_t rows) noexcept { return rows >= 12; }

/// Whether two dimensions of bfloat16 share a lane and are multiplied without widening.
#if defined(REFREEKV_FAST_BF16)
template <class Product>
inline constexpr bool in_pairs = std::is_same_v<typename Product::packed, std::uint16_t>;
#else
template <class Product>
inline constexpr bool in_pairs = false;
#endif

/// Returns `head_dim` rounded up to dimensions that are transposed together.
template <class Key>
constexpr index_t transposed_dim(index_t head_dim) noexcept {
  constexpr index_t dims = bfloat16_element<Key> ? index_t{2} * lane_count : lane_count;
  return (head_dim + dims - 1) / dims * dims;
}

/// Exchanges the rows and columns of blocks of `size` registers and lanes, in pairs of blocks.
template <int size>
REFREEKV_ALWAYS_INLINE void exchange(lanes (&x)[std::size_t{lane_count}]) noexcept {
  constexpr int b = lane_count;
#pragma GCC unroll 16
  for (int i = 0; i < lane_count; ++i) {
    if ((i & size) != 0) continue;
    const lanes upper = x[i], lower = x[i + size];
    x[i] = shuffle(upper, lower, [](int l) { return (l & size) != 0 ? b + l - size : l; });
    x[i + size] = shuffle(upper, lower, [](int l) { return (l & size) != 0 ? b + l : l + size; });
  }
}

/// Moves lane j of register i to lane i of register j.
REFREEKV_ALWAYS_INLINE void transpose(lanes (&x)[std::size_t{lane_count}]) noexcept {
  if constexpr (lane_count == 16) exchange<8>(x);
  if constexpr (lane_count >= 8) exchange<4>(x);
  exchange<2>(x);
  exchange<1>(x);
}

/// Writes the dimensions, or pairs of them, of lane_count keys to block [dim, block_tokens], a
/// token in each column. Reads transposed_dim(1) dimensions of each key.
template <bool pairs, class Key>
REFREEKV_ALWAYS_INLINE void transpose_part(const Key* const* keys, index_t first,
                                           float* block) noexcept {
  lanes x[std::size_t{lane_count}];
#if defined(REFREEKV_VECTOR_LANES) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  if constexpr (bfloat16_element<Key>) {  // pairs of dimensions move together
#pragma GCC unroll 16
    for (int i = 0; i < lane_count; ++i) std::memcpy(&x[i], keys[i] + first, sizeof x[i]);
    transpose(x);
#pragma GCC unroll 16
    for (index_t i = 0; i < lane_count; ++i) {
      if constexpr (pairs) {
        store(x[i], block + i * block_tokens);
        continue;
      }
      const auto pair = std::bit_cast<lane_bits>(x[i]);
      store(std::bit_cast<lanes>(pair << 16), block + 2 * i * block_tokens);
      store(std::bit_cast<lanes>(pair & 0xffff0000u), block + (2 * i + 1) * block_tokens);
    }
    return;
  }
#endif
  for (index_t d = 0; d < transposed_dim<Key>(1); d += lane_count) {
#pragma GCC unroll 16
    for (int i = 0; i < lane_count; ++i) x[i] = load(keys[i] + first + d);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < lane_count; ++i) store(x[i], block + (d + i) * block_tokens);
  }
}

/// Writes keys [block_tokens, head_dim] to block [transposed_dim, block_tokens], or half as many
/// rows of pairs.
template <bool pairs, class Key>
void transpose_keys(const Key* const* keys, index_t dim_stride, index_t head_dim,
                    float* block) noexcept {
  constexpr index_t dims = transposed_dim<Key>(1);
  for (index_t d = 0; d < head_dim; d += dims) {
    for (index_t half = 0; half < block_tokens; half += lane_count) {
      float* to = block + (pairs ? d / 2 : d) * block_tokens + half;
      if (dim_stride == 1 && d + dims <= head_dim) {
        transpose_part<pairs>(keys + half, d, to);
        continue;
      }
      Key parts[std::size_t{lane_count * dims}];
      const Key* at[std::size_t{lane_count}];
      std::memset(static_cast<void*>(parts), 0, sizeof parts);
      for (index_t i = 0; i < lane_count; ++i) {
        at[i] = parts + i * dims;
        for (index_t j = 0; j < (std::min)(dims, head_dim - d); ++j) {
          parts[i * dims + j] = keys[half + i][(d + j) * dim_stride];
        }
      }
      transpose_part<pairs>(at, 0, to);
    }
  }
}

/// Lanes that head_dim dimensions take.
template <bool pairs>
constexpr index_t lanes_of(index_t head_dim) noexcept {
  return pairs ? (head_dim + 1) / 2 : head_dim;
}

/// Packs the query [head_dim] of one of `rows` rows into packed [row in whole blocks, lanes_of].
/// The rows of a block are interleaved; rows that a block lacks are 0.
template <bool pairs, class Query>
void pack_in_blocks(const Query* query, index_t stride, index_t head_dim, index_t row, index_t rows,
                    float* packed) noexcept {
  const index_t width = lanes_of<pairs>(head_dim);
  const auto at = [&](index_t r) {
    const index_t first = r / block_rows * block_rows;
    return packed + first * width + r - first;
  };
  for (index_t i = 0; i < width; ++i) {
    if constexpr (pairs) {
      const auto bits = [&](index_t d) -> std::uint32_t {
        return d < head_dim ? std::bit_cast<std::uint16_t>(query[d * stride]) : 0;
      };
      at(row)[i * block_rows] = detail::as_float(bits(2 * i) | bits(2 * i + 1) << 16);
    } else {
      at(row)[i * block_rows] = widen(query[i * stride]);
    }
  }
  for (index_t r = rows; row == rows - 1 && r % block_rows != 0; ++r) {
    for (index_t i = 0; i < width; ++i) at(r)[i * block_rows] = 0;
  }
}

/// Adds the products of one lane's dimensions, or pair of dimensions.
template <bool pairs>
REFREEKV_ALWAYS_INLINE void add_lane(lanes& sum, const lanes& query, const lanes& key) noexcept {
#if defined(REFREEKV_FAST_BF16)
  if constexpr (pairs) {
    sum = std::bit_cast<lanes>(_mm512_dpbf16_ps(
        std::bit_cast<__m512>(sum), std::bit_cast<__m512bh>(query), std::bit_cast<__m512bh>(key)));
    return;
  }
#endif
  sum += query * key;
}

/// Writes to values [row, stride] the scaled products of a block of packed queries with a block of
/// transposed keys: `rows` rows, block_tokens tokens. O(block_rows * block_tokens * width).
template <bool pairs>
void multiply_block(const float* queries, const float* keys, index_t width, float scale,
                    index_t rows, float* values, index_t stride) noexcept {
  lanes sums[std::size_t{block_rows}][2];
#pragma GCC unroll 8
  for (auto& of_row : sums) of_row[0] = of_row[1] = splat(0);
#pragma GCC unroll 1
  for (index_t i = 0; i < width; ++i) {
    const lanes first = load(keys), second = load(keys + lane_count);
#pragma GCC unroll 8
    for (index_t r = 0; r < block_rows; ++r) {
      lanes q = splat(queries[r]);
      keep(q);
      add_lane<pairs>(sums[r][0], q, first);
      add_lane<pairs>(sums[r][1], q, second);
    }
    keys += block_tokens;
    queries += block_rows;
  }
#pragma GCC unroll 8
  for (index_t r = 0; r < block_rows; ++r) {
    if (r >= rows) break;
    store(sums[r][0] * scale, values + r * stride);
    store(sums[r][1] * scale, values + r * stride + lane_count);
  }
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
