// SPDX-License-Identifier: Apache-2.0
// Dot products of queries with keys, four tokens at a time. Key rows may lie anywhere in memory.
#pragma once

#include <algorithm>

#include "refreekv/cpu/simd/element.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// How a register of query elements is multiplied with a register of key elements. Queries are
/// packed once, so that a key needs as little work as possible.
template <class Query, class Key>
struct product {
  using packed = float;  ///< an element of a packed query
  using query_lanes = lanes;
  using key_lanes = lanes;

  static constexpr index_t dims = lane_count;  ///< dimensions multiplied at a time

  /// Returns where dimension d, in [0, dims), of a query is packed.
  static constexpr index_t place(index_t d) noexcept { return d; }
  static packed pack(Query x) noexcept { return widen(x); }

  REFREEKV_ALWAYS_INLINE static query_lanes load_query(const packed* query) noexcept {
    query_lanes q = load(query);
    keep(q);
    return q;
  }
  REFREEKV_ALWAYS_INLINE static key_lanes load_key(const Key* key) noexcept {
    key_lanes k = load(key);
    keep(k);
    return k;
  }
  REFREEKV_ALWAYS_INLINE static void multiply_add(lanes& sum, const query_lanes& q,
                                                  const key_lanes& k) noexcept {
    sum += q * k;
  }
};

#if defined(REFREEKV_VECTOR_LANES) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__

/// bfloat16 is the upper half of a float. Of 32 bits that hold two key elements, a shift widens one
/// and a mask widens the other. Queries are packed to match: the even dimensions before the odd
/// ones.
template <class Query, bfloat16_element Key>
struct product<Query, Key> {
  using packed = float;
  struct query_lanes {
    lanes even, odd;
  };
  using key_lanes = lane_bits;

  static constexpr index_t dims = index_t{2} * lane_count;

  static constexpr index_t place(index_t d) noexcept { return d % 2 * lane_count + d / 2; }
  static packed pack(Query x) noexcept { return widen(x); }

  REFREEKV_ALWAYS_INLINE static query_lanes load_query(const packed* query) noexcept {
    query_lanes q{load(query), load(query + lane_count)};
    keep(q.even);
    keep(q.odd);
    return q;
  }
  REFREEKV_ALWAYS_INLINE static key_lanes load_key(const Key* key) noexcept {
    key_lanes k;
    std::memcpy(&k, key, sizeof k);
    return k;
  }
  REFREEKV_ALWAYS_INLINE static void multiply_add(lanes& sum, const query_lanes& q,
                                                  const key_lanes& k) noexcept {
    sum += q.even * std::bit_cast<lanes>(k << 16);
    sum += q.odd * std::bit_cast<lanes>(k & 0xffff0000u);
  }
};

#endif

/// Tokens, and the largest number of query rows, of a tile. Their sums fit in the registers
/// together.
inline constexpr index_t tile_tokens = 4;
inline constexpr index_t tile_rows = lane_registers / 8;

/// Tokens of a tile whose keys are read side by side, so that a query is loaded once for all of
/// them. Fewer interleaved tokens read memory more sequentially, which the prefetcher prefers.
inline constexpr index_t interleaved_tokens = lane_registers == 32 ? 2 : 4;

/// Returns the elements of a packed query: head_dim rounded up to whole steps of `dims`. The last
/// step is filled with zeros.
template <class Product>
constexpr index_t packed_dim(index_t head_dim) noexcept {
  return (head_dim + Product::dims - 1) / Product::dims * Product::dims;
}

/// Packs the query [head_dim] of one of `rows` rows into packed [rows, packed_dim]. Groups of
/// tile_rows rows are interleaved step by step, so that a tile reads its group sequentially.
template <class Product, class Query>
void pack(const Query* query, index_t stride, index_t head_dim, index_t row, index_t rows,
          typename Product::packed* packed) noexcept {
  const index_t first = row / tile_rows * tile_rows;
  const index_t together = (std::min)(tile_rows, rows - first);
  packed += first * packed_dim<Product>(head_dim) + (row - first) * Product::dims;
  for (index_t d = 0; d < packed_dim<Product>(head_dim); ++d) {
    const index_t step = d / Product::dims, i = d % Product::dims;
    packed[step * together * Product::dims + Product::place(i)] =
        d < head_dim ? Product::pack(query[d * stride]) : typename Product::packed{};
  }
}

// The sums over the lanes of a tile's registers take three steps; the first two process each row
// alone. In the shuffles, b is the first lane of the second operand.

/// Returns for each group of four lanes: x0 + x2, y0 + y2, x1 + x3, y1 + y3.
REFREEKV_ALWAYS_INLINE lanes sum_halves(const lanes& x, const lanes& y) noexcept {
  constexpr int b = lane_count;
  return shuffle(x, y, [](int i) { return i % 2 * b + i / 4 * 4 + i % 4 / 2; }) +
         shuffle(x, y, [](int i) { return i % 2 * b + i / 4 * 4 + i % 4 / 2 + 2; });
}

/// Returns for each group of four lanes the sums of four tokens. Requires sum_halves of tokens 0
/// and 1 in ab, and of tokens 2 and 3 in cd.
REFREEKV_ALWAYS_INLINE lanes sum_quarters(const lanes& ab, const lanes& cd) noexcept {
  constexpr int b = lane_count;
  return shuffle(ab, cd, [](int i) { return i % 4 / 2 * b + i / 4 * 4 + i % 2; }) +
         shuffle(ab, cd, [](int i) { return i % 4 / 2 * b + i / 4 * 4 + i % 2 + 2; });
}

/// Adds neighbouring groups of four lanes: first those of x, then those of y.
REFREEKV_ALWAYS_INLINE lanes sum_neighbours(const lanes& x, const lanes& y) noexcept {
  return shuffle(x, y, [](int i) { return i / 4 * 8 + i % 4; }) +
         shuffle(x, y, [](int i) { return i / 4 * 8 + i % 4 + 4; });
}

/// Rows in a result register, and result registers of a tile. A register holds the four tokens of
/// each of its rows, row by row.
inline constexpr index_t rows_a_register = lane_count / tile_tokens;
constexpr index_t result_registers(index_t rows) noexcept {
  return (rows + rows_a_register - 1) / rows_a_register;
}

/// Calls take(i, register i) with the results of a tile. Requires sum_halves [row, pair of tokens].
template <index_t rows, class Take>
REFREEKV_ALWAYS_INLINE void reduce_tile(const lanes (&halves)[std::size_t{rows}][2],
                                        const Take& take) noexcept {
  const auto quarters = [&](index_t row) {
    const auto& of_row = halves[(std::min)(row, rows - 1)];
    return sum_quarters(of_row[0], of_row[1]);
  };
  const auto result = [&](index_t i) {
    const index_t row = i * rows_a_register;
    if constexpr (rows_a_register == 1) {
      return quarters(row);
    } else if constexpr (rows_a_register == 2) {
      return sum_neighbours(quarters(row), quarters(row + 1));
    } else {
      return sum_neighbours(sum_neighbours(quarters(row), quarters(row + 1)),
                            sum_neighbours(quarters(row + 2), quarters(row + 3)));
    }
  };
  [&]<index_t... i>(std::integer_sequence<index_t, i...>) {
    (take(i, result(i)), ...);
  }(std::make_integer_sequence<index_t, result_registers(rows)>());
}

/// Loads the last `dims` elements of a key, followed by zeros.
template <class Product, class Key>
typename Product::key_lanes load_rest(const Key* key, index_t dims) noexcept {
  Key rest[static_cast<std::size_t>(Product::dims)];
  std::memset(static_cast<void*>(rest), 0, sizeof rest);
  std::memcpy(static_cast<void*>(rest), key, static_cast<std::size_t>(dims) * sizeof(Key));
  return Product::load_key(rest);
}

/// Adds the products of `Product::dims` dimensions of the tokens read side by side.
template <class Product, index_t rows>
REFREEKV_ALWAYS_INLINE void add_products(
    const typename Product::packed* query,
    const typename Product::key_lanes (&key)[std::size_t{interleaved_tokens}],
    lanes (&sums)[std::size_t{rows}][std::size_t{interleaved_tokens}]) noexcept {
#pragma GCC unroll 8
  for (index_t r = 0; r < rows; ++r) {
    const auto q = Product::load_query(query + r * Product::dims);
#pragma GCC unroll 8
    for (index_t t = 0; t < interleaved_tokens; ++t) Product::multiply_add(sums[r][t], q, key[t]);
  }
}

/// Addresses [token] of the current keys, and of keys to prefetch soon and later. Each key is
/// prefetched twice, because a busy processor drops prefetches.
template <class Key>
struct key_addresses {
  const Key* const* current;
  const Key* const* prefetch_near;
  const Key* const* prefetch_far;
};

/// Computes queries [row, packed_dim] . keys [token, head_dim] for the rows of a tile. Calls
/// take(i, first, x) with result register i for the four tokens from `first` on. Processes tokens
/// in fours: requires addresses for `count` rounded up to a multiple of four.
template <class Product, index_t rows, class Key, class Take>
REFREEKV_ALWAYS_INLINE void dot_rows(const typename Product::packed* queries,
                                     const key_addresses<Key>& keys, index_t count,
                                     index_t head_dim, const Take& take) noexcept {
  constexpr index_t dims = Product::dims;
  const index_t whole = head_dim / dims * dims;
  for (index_t first = 0; first < count; first += tile_tokens) {
    lanes halves[std::size_t{rows}][2];
#pragma GCC unroll 8
    for (index_t token = 0; token < tile_tokens; token += interleaved_tokens) {
      constexpr auto interleaved = std::size_t{interleaved_tokens};
      lanes sums[std::size_t{rows}][interleaved];
#pragma GCC unroll 8
      for (index_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (index_t t = 0; t < interleaved_tokens; ++t) sums[r][t] = splat(0);
      }
      const Key *current[interleaved], *prefetch_near[interleaved], *prefetch_far[interleaved];
#pragma GCC unroll 8
      for (index_t t = 0; t < interleaved_tokens; ++t) {
        current[t] = keys.current[first + token + t];
        prefetch_near[t] = keys.prefetch_near[first + token + t];
        prefetch_far[t] = keys.prefetch_far[first + token + t];
      }
      typename Product::key_lanes key[interleaved];
#pragma GCC unroll 1
      for (index_t d = 0; d < whole; d += dims) {
#pragma GCC unroll 8
        for (index_t t = 0; t < interleaved_tokens; ++t) {
          key[t] = Product::load_key(current[t] + d);
          prefetch(prefetch_far[t] + d);
          prefetch(prefetch_near[t] + d);
        }
        add_products<Product, rows>(queries + d * rows, key, sums);
      }
      if (whole < head_dim) {
#pragma GCC unroll 8
        for (index_t t = 0; t < interleaved_tokens; ++t) {
          key[t] = load_rest<Product>(current[t] + whole, head_dim - whole);
        }
        add_products<Product, rows>(queries + whole * rows, key, sums);
      }
#pragma GCC unroll 8
      for (index_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (index_t t = 0; t < interleaved_tokens; t += 2) {
          halves[r][(token + t) / 2] = sum_halves(sums[r][t], sums[r][t + 1]);
        }
      }
    }
    reduce_tile<rows>(halves, [&](index_t i, const lanes& x) { take(i, first, x); });
  }
}

/// Calls f(rows of the tile, its first row, its packed queries) for each tile of `rows` rows.
template <class Product, class F>
void for_each_tile(const typename Product::packed* queries, index_t rows, index_t head_dim,
                   const F& f) noexcept {
  static_assert(tile_rows == 4 || tile_rows == 2);
  for (index_t r = 0; r < rows; r += tile_rows) {
    const auto* tile = queries + r * packed_dim<Product>(head_dim);
    switch ((std::min)(rows - r, tile_rows)) {
      case 4: f(std::integral_constant<index_t, tile_rows>(), r, tile); break;
      case 3: f(std::integral_constant<index_t, tile_rows - 1>(), r, tile); break;
      case 2: f(std::integral_constant<index_t, 2>(), r, tile); break;
      default: f(std::integral_constant<index_t, 1>(), r, tile); break;
    }
  }
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
