// SPDX-License-Identifier: Apache-2.0
// Ridge regression over a KV head's rows on a device: maps the excess of a key's logits to the
// change of the key that removes it.
#pragma once

#include "refreekv/cuda/faithful/bare_logits.hpp"
#include "refreekv/cuda/faithful/importance_scratch.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The regression's matrix for each KV head, where X has its rows x: X^T X or, with fewer rows than
/// dimensions, X X^T (the dual). Both give the same map, because (X^T X + l I)^-1 X^T is
/// X^T (X X^T + l I)^-1. Rows that do not exist count as zeros.
template <class Layer>
struct regression {
  Layer layer;
  index_t rows;    ///< per query head
  double* memory;  ///< [sequence, kv_head, order + 1, order]: the matrix, and a column of scratch

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t rows_of_head() const noexcept {
    return layer.q_heads() / layer.kv_heads() * rows;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool is_dual() const noexcept {
    return rows_of_head() < layer.head_dim();
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t order() const noexcept {
    return is_dual() ? rows_of_head() : layer.head_dim();
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t heads() const noexcept {
    return kv_head_items(layer);
  }
  /// head: [sequence, kv_head]
  [[nodiscard]] REFREEKV_DEVICE double* matrix(index_t head) const noexcept {
    return memory + head * (order() + 1) * order();
  }
  [[nodiscard]] REFREEKV_DEVICE bool exists(index_t head, index_t row) const noexcept {
    return row % rows >= window_of(layer, head / layer.kv_heads(), rows).first_row();
  }
  /// An element of row [q_head, row], times the attention scale. Requires that the row exists.
  [[nodiscard]] REFREEKV_DEVICE double x(index_t head, index_t row, index_t dim) const noexcept {
    const index_t group = layer.q_heads() / layer.kv_heads();
    return double{layer.info.attention.scale *
                  widen(layer.queries(head / layer.kv_heads(), layer.window() - rows + row % rows,
                                      head % layer.kv_heads() * group + row / rows, dim))};
  }
};

/// Writes the lower half of each matrix, diagonal included. One warp per row of the matrix.
template <class Layer>
struct normal_body {
  struct shared {};
  regression<Layer> of;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t parts() const noexcept {
    return (of.order() + block_warps - 1) / block_warps;
  }
  [[nodiscard]] constexpr index_t items() const noexcept { return of.heads() * parts(); }

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t head = item / parts(), order = of.order();
    const index_t i = item % parts() * block_warps + warp_of(block);
    for (index_t j = lane_of(block); i < order && j <= i; j += warp_threads) {
      double sum = 0;
      if (!of.is_dual()) {
        for (index_t r = 0; r < of.rows_of_head(); ++r) {
          if (of.exists(head, r)) sum += of.x(head, r, i) * of.x(head, r, j);
        }
      } else if (of.exists(head, i) && of.exists(head, j)) {
        for (index_t d = 0; d < of.layer.head_dim(); ++d) {
          sum += of.x(head, i, d) * of.x(head, j, d);
        }
      }
      of.matrix(head)[i * order + j] = sum;
    }
  }
};

/// Returns l, the value added to a matrix's diagonal: ridge * trace / head_dim. Returns 0, for no
/// regression, unless the trace is positive and finite. All of the regression is in double, because
/// its condition number is up to head_dim / ridge.
template <class Layer, thread_block Block>
[[nodiscard]] REFREEKV_DEVICE double ridge_of(Block& block, warp_values<double>& shared,
                                              const regression<Layer>& of, index_t head,
                                              double ridge) noexcept {
  double trace = 0;
  for (index_t i = block.rank(); i < of.order(); i += block_threads) {
    trace += of.matrix(head)[i * of.order() + i];
  }
  trace = block_reduce(block, shared, trace, plus{});
  return trace > 0 && trace < HUGE_VAL ? ridge * trace / static_cast<double>(of.layer.head_dim())
                                       : 0;
}

template <class Layer, thread_block Block>
REFREEKV_DEVICE void clear_matrix(const Block& block, const regression<Layer>& of,
                                  index_t head) noexcept {
  for (index_t i = block.rank(); i < of.order() * of.order(); i += block_threads) {
    of.matrix(head)[i] = 0;
  }
}

/// Replaces each matrix by -(matrix + l I)^-1, both halves of it, or by 0 without a regression.
/// Sweeps one row and column after the other, which keeps the matrix symmetric. A thread holds
/// every 16th row and column of the lower half in registers.
template <class Layer>
struct small_inverse_body {
  static constexpr int side = 16, strips = 8, most_order = side * strips;
  static constexpr int resident_blocks = 1;
  static_assert(side * side == block_threads);
  struct shared {
    double columns[2][most_order];  // used alternately
    warp_values<double> sums;
  };
  regression<Layer> of;
  double ridge;

  [[nodiscard]] constexpr index_t items() const noexcept { return of.heads(); }

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const double more = ridge_of(block, s.sums, of, item, ridge);
    if (!(more > 0)) return clear_matrix(block, of, item);
    double* const matrix = of.matrix(item);
    const int order = narrow(of.order()), y = block.rank() / side, x = block.rank() % side;
    double own[strips][strips];  // [a, b]: row a * side + y, column b * side + x; b <= a
    REFREEKV_UNROLL
    for (int a = 0; a < strips; ++a) {
      REFREEKV_UNROLL
      for (int b = 0; b <= a; ++b) {
        const int i = a * side + y, j = b * side + x, low = i < j ? i : j, high = i < j ? j : i;
        own[a][b] = high < order ? matrix[high * order + low] + (i == j ? more : 0) : 0;
      }
    }
    REFREEKV_UNROLL
    for (int strip = 0; strip < strips; ++strip) {
      REFREEKV_NO_UNROLL
      for (int k = strip * side; k < (strip + 1) * side && k < order; ++k) {
        sweep(block, s.columns[k % 2], own, strip, k, y, x);
      }
    }
    REFREEKV_UNROLL
    for (int a = 0; a < strips; ++a) {
      REFREEKV_UNROLL
      for (int b = 0; b <= a; ++b) {
        const int i = a * side + y, j = b * side + x;
        if (i >= order || j >= order || (a == b && i < j)) continue;
        matrix[i * order + j] = own[a][b];
        matrix[j * order + i] = own[a][b];
      }
    }
  }

 private:
  /// Sweeps row and column k. strip: k / side
  template <thread_block Block>
  static REFREEKV_DEVICE void sweep(Block& block, double* column, double (&own)[strips][strips],
                                    int strip, int k, int y, int x) noexcept {
    const bool has_row = k == strip * side + y, has_column = k == strip * side + x;
    REFREEKV_UNROLL
    for (int a = 0; a < strips; ++a) {
      if (a >= strip) {
        if (has_column) column[a * side + y] = own[a][strip];
      } else {
        if (has_row) column[a * side + x] = own[strip][a];
      }
    }
    block.sync();
    const double inverse = 1 / column[k];
    double factors[strips];
    REFREEKV_UNROLL
    for (int b = 0; b < strips; ++b) {
      factors[b] = b == strip && has_column ? -1 : column[b * side + x];
    }
    REFREEKV_UNROLL
    for (int a = 0; a < strips; ++a) {
      const double factor = a == strip && has_row ? -inverse : column[a * side + y] * inverse;
      REFREEKV_UNROLL
      for (int b = 0; b <= a; ++b) {
        const bool starts = (a == strip && has_row) || (b == strip && has_column);
        own[a][b] = (starts ? 0 : own[a][b]) - factor * factors[b];
      }
    }
  }
};

/// As small_inverse_body, but in global memory, for a matrix that is too large for registers.
template <class Layer>
struct inverse_body {
  using shared = warp_values<double>;
  regression<Layer> of;
  double ridge;

  [[nodiscard]] constexpr index_t items() const noexcept { return of.heads(); }

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const double more = ridge_of(block, s, of, item, ridge);
    if (!(more > 0)) return clear_matrix(block, of, item);
    const index_t order = of.order();
    double* const matrix = of.matrix(item);
    double* const column = matrix + order * order;
    for (index_t i = block.rank(); i < order; i += block_threads) matrix[i * order + i] += more;
    block.sync();
    for (index_t k = 0; k < order; ++k) {
      for (index_t i = block.rank(); i < order; i += block_threads) {
        column[i] = i >= k ? matrix[i * order + k] : matrix[k * order + i];
      }
      block.sync();
      const double inverse = 1 / column[k];
      for (index_t i = warp_of(block); i < order; i += block_warps) {
        const double factor = column[i] * inverse;
        double* const row = matrix + i * order;
        for (index_t j = lane_of(block); j <= i; j += warp_threads) {
          row[j] = i == k   ? (j == k ? -inverse : column[j] * inverse)
                   : j == k ? factor
                            : row[j] - factor * column[j];
        }
      }
      block.sync();
    }
    for (index_t i = warp_of(block); i < order; i += block_warps) {
      for (index_t j = lane_of(block); j < i; j += warp_threads) {
        matrix[j * order + i] = matrix[i * order + j];
      }
    }
  }
};

/// Writes map [sequence, q_head, rows, head_dim] from the inverse matrices, for rows that exist.
/// One warp per row.
template <class Layer>
struct map_body {
  struct shared {};
  regression<Layer> of;
  float* map;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return (of.heads() * of.rows_of_head() + block_warps - 1) / block_warps;
  }

  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t row = item * block_warps + warp_of(block), dims = of.layer.head_dim();
    const index_t head = row / of.rows_of_head(), own = row % of.rows_of_head();
    if (head >= of.heads() || !of.exists(head, own)) return;
    const double* const matrix = of.matrix(head);
    for (index_t d = lane_of(block); d < dims; d += warp_threads) {
      double sum = 0;
      if (!of.is_dual()) {
        for (index_t e = 0; e < dims; ++e) sum += matrix[e * dims + d] * of.x(head, own, e);
      } else {
        for (index_t r = 0; r < of.rows_of_head(); ++r) {
          if (of.exists(head, r)) sum += matrix[own * of.order() + r] * of.x(head, r, d);
        }
      }
      map[row * dims + d] = static_cast<float>(sum);
    }
  }
};

/// Writes scratch.map, -(X^T X + l I)^-1 X^T of each KV head. It maps the excess of a key's logits
/// in all rows to the change of the key.
template <class Backend, class Layer>
[[nodiscard]] status fit_maps(const Backend& exec, const importance_rule& rule, const Layer& layer,
                              const importance_scratch& scratch) noexcept {
  arena memory = scratch.carve();
  const regression<Layer> of{scaled(layer), scratch.rows, scratch.carve_normal(memory, layer)};
  const normal_body<Layer> sums{of};
  status s = run_blocks(exec, sums.items(), sums);
  if (s != status::ok) return s;
  if (of.order() <= small_inverse_body<Layer>::most_order) {
    const small_inverse_body<Layer> inverse{of, rule.ridge};
    s = run_blocks(exec, inverse.items(), inverse);
  } else {
    const inverse_body<Layer> inverse{of, rule.ridge};
    s = run_blocks(exec, inverse.items(), inverse);
  }
  if (s != status::ok) return s;
  const map_body<Layer> map{of, scratch.map};
  return run_blocks(exec, map.items(), map);
}

}  // namespace refreekv::inline v0::cuda_detail
