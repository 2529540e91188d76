// SPDX-License-Identifier: Apache-2.0
// Logits of a tile of queries against a chunk of keys: the read that dominates every decision.
//
// Neighbouring threads read a key, each a slot of up to 16 bytes. They multiply it with every query
// of the tile before the next key, so the query heads of a group share the read. Reads go through
// shared memory, a round ahead of the products: they stay in flight during reductions.
#pragma once

#include <cmath>

#include "refreekv/attention/chunk_statistics.hpp"
#include "refreekv/attention/observe.hpp"
#include "refreekv/backend/logit.hpp"
#include "refreekv/cuda/key_reader.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Each thread has one token of a chunk.
static_assert(chunk_tokens == block_threads);

/// Slots that a thread has in flight in each of the two rounds.
inline constexpr int reads_ahead = 4;

/// Returns n as an int, for numbers that fit in every valid layer. An index_t needs two registers.
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr int narrow(index_t n) noexcept {
  return static_cast<int>(n);
}

/// Rows [row, row + rows) of `heads` query heads, numbered [q_head, row].
struct row_span {
  int q_head;  ///< the first query head
  int heads;
  int row;  ///< the first row, counted in the window
  int rows;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr int count() const noexcept { return heads * rows; }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr int q_head_of(int i) const noexcept {
    return q_head + (rows == 1 ? i : i / rows);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr int row_of(int i) const noexcept {
    return row + (rows == 1 ? 0 : i % rows);
  }
};

/// The rows and tokens that a block works on. The rows are those of a span from number `first` on,
/// as many as the tile has; the tile's rows past the span's end are unused.
struct tile_place {
  int sequence;
  int kv_head;
  row_span span;
  int first;
  token_range tokens;  ///< at most chunk_tokens

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr int size() const noexcept {
    return static_cast<int>(tokens.end - tokens.begin);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t token(int i) const noexcept {
    return tokens.begin + i;
  }
};

/// The shared memory of a tile of `Rows` rows.
template <int Rows>
struct tile_rows {
  /// Rows are padded by 4 floats: rows that a warp stores together then use different banks.
  float values[std::size_t{Rows}][block_threads + 4];
  chunk_statistics statistics[std::size_t{Rows}];
  float weights[std::size_t{Rows}];  ///< attention of a value of 1, see set_weights
};
template <class Layer, int Rows>
struct tile : tile_rows<Rows> {};
template <class Query, class Keys, int Rows>
struct tile<query_layer<Query, Keys>, Rows> : tile_rows<Rows> {
  typename key_reader<Keys>::slot staging[2][reads_ahead][block_threads];
  typename key_reader<Keys>::address keys[block_threads];
};

/// Loads dimensions [dim, dim + N) of a query, with zeros past its end. query: [head_dim] or null.
template <int N, class Query>
REFREEKV_DEVICE void load_query(const Query* query, index_t stride, index_t dim, index_t dims,
                                float (&to)[std::size_t{N}]) noexcept {
  constexpr int width = fragment_elements<Query>;
  const bool is_vector = N % width == 0 && stride == 1 && query != nullptr && dim + N <= dims &&
                         reinterpret_cast<std::uintptr_t>(query + dim) % sizeof(vector16) == 0;
  if (is_vector) {
    REFREEKV_UNROLL
    for (int i = 0; i + width <= N; i += width) {
      vector16 bits;
      std::memcpy(&bits, __builtin_assume_aligned(query + dim + i, sizeof bits), sizeof bits);
      float part[std::size_t{width}];
      unpack<Query>(bits, part);
      REFREEKV_UNROLL
      for (int k = 0; k < width; ++k) to[i + k] = part[k];
    }
  } else {
    REFREEKV_UNROLL
    for (int i = 0; i < N; ++i) {
      to[i] = query != nullptr && dim + i < dims ? widen(query[(dim + i) * stride]) : 0;
    }
  }
}

/// Copies the words of a slot that lie within its first `bytes` bytes.
template <thread_block Block, class Slot>
REFREEKV_DEVICE void copy_words(Block& block, Slot& to, const char* from, unsigned bytes) noexcept {
  REFREEKV_UNROLL
  for (unsigned i = 0; i < sizeof(Slot); i += 4) {
    if (i < bytes) block.template copy_async<4>(reinterpret_cast<char*>(&to) + i, from + i);
  }
}

/// Writes q.k to the tile's values [row, token]. Requires a sync before they are read. Place:
/// tile_place, or a type with its members. O(Rows * tokens * head_dim)
template <int Lanes, int Rows, thread_block Block, class Query, class Keys, class Place>
REFREEKV_DEVICE void multiply(Block& block, tile<query_layer<Query, Keys>, Rows>& s,
                              const query_layer<Query, Keys>& layer, index_t rows,
                              const Place& at) noexcept {
  using reader = key_reader<Keys>;
  using slot = typename reader::slot;
  constexpr int width = reader::width;
  constexpr int tokens_at_once = block_threads / Lanes;
  constexpr int round = tokens_at_once * reads_ahead;
  constexpr int lanes_of_row = Lanes / Rows;  // lanes that end up with the same row
  const int count = at.size(), rank = block.rank();
  const int lane = rank % Lanes, own = rank / Lanes;
  const auto dims = static_cast<unsigned>(layer.head_dim());  // 32 bits: never part of an address

  int alignment = int{sizeof(slot)};
  if (rank < count) {
    s.keys[rank] = reader::at(layer.keys, at.sequence, at.kv_head, at.token(rank));
    alignment = reader::alignment(s.keys[rank], dims);
  }
  const bool in_slots = block.sync_and(alignment >= int{sizeof(slot)});
  const bool in_words = in_slots || block.sync_and(alignment >= 4);

  for (unsigned slice = 0; slice < dims; slice += unsigned{Lanes * width}) {
    const unsigned dim = slice + static_cast<unsigned>(lane * width);
    const bool has_dims = dim < dims;
    const auto fetch = [&](int base, int buffer) {
      if (in_slots) {
        REFREEKV_UNROLL
        for (int u = 0; u < reads_ahead; ++u) {
          const int token = base + u * tokens_at_once + own;
          if (token >= count || !has_dims) continue;
          block.template copy_async<int{sizeof(slot)}>(&s.staging[buffer][u][rank],
                                                       reader::data(s.keys[token], dim));
        }
      } else {
        REFREEKV_NO_UNROLL
        for (int u = 0; u < reads_ahead; ++u) {
          const int token = base + u * tokens_at_once + own;
          if (token >= count || !has_dims) continue;
          if (in_words) {
            copy_words(block, s.staging[buffer][u][rank], reader::data(s.keys[token], dim),
                       reader::bytes(dims) - reader::bytes(dim));
          } else {
            reader::gather(s.keys[token], dim, dims, s.staging[buffer][u][rank]);
          }
        }
      }
      block.commit();
    };
    if (dim + width > dims) {  // no copy writes past the last dimension
      for (int u = 0; u < 2 * reads_ahead; ++u)
        s.staging[u / reads_ahead][u % reads_ahead][rank] = {};
    }
    fetch(0, 0);
    float query[std::size_t{Rows}][std::size_t{width}];
    REFREEKV_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const int of = at.first + i;
      const index_t row = layer.window() - rows + at.span.row_of(of);
      load_query<width>(of < at.span.count()
                            ? layer.queries.at(at.sequence, row, at.span.q_head_of(of))
                            : nullptr,
                        layer.queries.stride(3), dim, dims, query[i]);
    }
    [[maybe_unused]] float common = 0;  // of the row that the thread ends up with
    if constexpr (reader::has_common) {
      float products[std::size_t{Rows}];
      REFREEKV_UNROLL
      for (int i = 0; i < Rows; ++i) {
        products[i] = reader::common(s.keys[0], dim, dims, query[i]);
      }
      common = block.template tile_reduce_scatter<Lanes>(products, plus{});
    }
    int buffer = 0;
    for (int base = 0; base < count; base += round, buffer ^= 1) {
      fetch(base + round, buffer ^ 1);
      block.template wait<1>();
      REFREEKV_UNROLL
      for (int u = 0; u < reads_ahead; ++u) {
        const int token = base + u * tokens_at_once + own;
        float key[std::size_t{width}], dots[std::size_t{Rows}];
        reader::unpack(s.staging[buffer][u][rank], s.keys[token], key);
        REFREEKV_UNROLL
        for (int i = 0; i < Rows; ++i) {
          dots[i] = 0;
          REFREEKV_UNROLL
          for (int d = 0; d < width; ++d) dots[i] += query[i][d] * key[d];
        }
        float dot = block.template tile_reduce_scatter<Lanes>(dots, plus{});
        if constexpr (reader::has_common) dot += common;
        if (lane % lanes_of_row == 0 && token < count) {
          float& value = s.values[lane / lanes_of_row][token];
          value = slice == 0 ? dot : value + dot;
        }
      }
    }
    block.template wait<0>();
  }
}

/// Returns the layer with its scale computed, so that no thread does a root and a division.
template <class Query, class Keys>
[[nodiscard]] query_layer<Query, Keys> scaled(query_layer<Query, Keys> layer) noexcept {
  layer.info.attention.scale = layer.scale();
  return layer;
}
template <class Row, class Memory>
[[nodiscard]] const row_layer<Row, Memory>& scaled(const row_layer<Row, Memory>& layer) noexcept {
  return layer;
}

/// Returns the logit of a product q.k: scale, soft cap, ALiBi; -inf if the row does not see the
/// token. Requires a `scaled` layer. cap_inverse: 1 / soft_cap.
template <class Query, class Keys>
[[nodiscard]] REFREEKV_DEVICE float logit(const query_layer<Query, Keys>& layer,
                                          const query_window& window, double cap_inverse,
                                          index_t row, index_t q_head, index_t token,
                                          float product) noexcept {
  const auto& params = layer.info.attention;
  const token_range visible = window.visible(row);
  if (token < visible.begin || token >= visible.end) return -infinity;
  float x = product * params.scale;
  if (params.soft_cap > 0) {
    x = detail::soft_capped(x, double{params.soft_cap}, cap_inverse,
                            std::exp(x * (2 * cap_inverse)));
  }
  if (params.alibi_slopes.data() != nullptr) {
    const double slope = params.alibi_slopes(q_head);
    x = detail::with_alibi(x, slope, token - (window.position + row));
  }
  return x;
}

/// Fills the tile's values with logits of the last `rows` rows; -inf in rows that do not exist.
/// Synchronises the block at the end.
template <int Lanes, int Rows, thread_block Block, class Query, class Keys>
REFREEKV_DEVICE void fill(Block& block, tile<query_layer<Query, Keys>, Rows>& s,
                          const query_layer<Query, Keys>& layer, index_t rows,
                          const tile_place& at) noexcept {
  multiply<Lanes>(block, s, layer, rows, at);
  block.sync();
  // Computed only now: while keys are read there is no register for it.
  const query_window window = window_of(layer, at.sequence, rows);
  // Outside the loop and behind a branch: otherwise compilers divide even without a cap.
  double cap_inverse = 0;
  if (const float cap = layer.info.attention.soft_cap; cap > 0) cap_inverse = 1 / double{cap};
  const int t = block.rank();
  if (t < at.size()) {
    REFREEKV_NO_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const int of = at.first + i;
      const index_t row = at.span.row_of(of);
      const bool exists = of < at.span.count() && row >= window.first_row();
      s.values[i][t] =
          exists ? logit(layer, window, cap_inverse, row, at.span.q_head_of(of),
                         at.tokens.begin + t, key_reader<Keys>::product(s.keys[t], s.values[i][t]))
                 : -infinity;
    }
  }
  block.sync();
}

/// As above, but for ready rows: attention, and 0 if the row does not see the token.
template <int Lanes, int Rows, thread_block Block, class Row, class Memory>
REFREEKV_DEVICE void fill(Block& block, tile<row_layer<Row, Memory>, Rows>& s,
                          const row_layer<Row, Memory>& layer, index_t rows,
                          const tile_place& at) noexcept {
  const query_window window = window_of(layer, at.sequence, rows);
  const int t = block.rank();
  if (t < at.size()) {
    REFREEKV_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const int of = at.first + i;
      const index_t row = at.span.row_of(of), token = at.tokens.begin + t;
      float& value = s.values[i][t];
      value = 0;
      if (of >= at.span.count() || row < window.first_row()) continue;
      const token_range visible = window.visible(row);
      if (token < visible.begin || token >= visible.end) continue;
      value = widen(layer.rows(at.sequence, layer.window() - window.rows + row,
                               at.span.q_head_of(of), token));
    }
  }
  block.sync();
}

}  // namespace refreekv::inline v0::cuda_detail
