// SPDX-License-Identifier: Apache-2.0
// Small matrix products without memory of their own. Eigen's product packs its operands on the
// stack, or on the heap if they are large.
#pragma once

#include <algorithm>
#include <cmath>

#include "refreekv/cpu/simd/element.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Returns `count` rounded up to whole registers of any target: a multiple of 16 floats.
constexpr index_t whole_registers(index_t count) noexcept { return (count + 15) / 16 * 16; }

/// Returns the dot product of two rows of whole_registers(dims) elements, in double.
template <class Other>
[[nodiscard]] inline double wide_dot(const float* row, const Other* other, index_t dims) noexcept {
  constexpr index_t step = lane_count / 2;
  wide_lanes sums[2] = {load_wide(row) * load_wide(other),
                        load_wide(row + step) * load_wide(other + step)};
  for (index_t d = 2 * step; d < dims; d += 2 * step) {
    sums[0] += load_wide(row + d) * load_wide(other + d);
    sums[1] += load_wide(row + d + step) * load_wide(other + d + step);
  }
  double sum = 0;
  const wide_lanes both = sums[0] + sums[1];
  for (int i = 0; i < lane_count / 2; ++i) sum += both[i];
  return sum;
}

/// Adds f(value) of values [count] to sums, in double. f takes a register or a double.
template <class F>
REFREEKV_ALWAYS_INLINE void add_wide(const float* values, index_t count, double* sums,
                                     const F& f) noexcept {
  constexpr index_t step = lane_count / 2;
  index_t i = 0;
  for (; i + step <= count; i += step) {
    store(wide_lanes(load_wide(sums + i) + f(load_wide(values + i))), sums + i);
  }
  for (; i < count; ++i) sums[i] += f(static_cast<double>(values[i]));
}

/// The left matrix of a product; its elements are read one by one.
struct left_factor {
  const float* data;
  index_t row_stride, column_stride;
};

/// The right matrix of a product; its rows hold whole_registers(columns) floats, and all are read.
struct right_factor {
  const float* data;
  index_t row_stride;
};

/// Adds a product: sums [rows, columns] += left [rows, depth] . right [depth, columns]. Requires
/// rows of `right` and `sums` that hold whole_registers(columns) floats. Adds in the order of the
/// depth.
template <int rows_together>
REFREEKV_ALWAYS_INLINE void add_product_rows(const left_factor& left, const right_factor& right,
                                             index_t depth, index_t columns, float* sums,
                                             index_t sums_stride) noexcept {
  for (index_t c = 0; c < columns; c += lane_count) {
    lanes sum[static_cast<std::size_t>(rows_together)];
#pragma GCC unroll 8
    for (int r = 0; r < rows_together; ++r) sum[r] = load(sums + r * sums_stride + c);
#pragma GCC unroll 1
    for (index_t k = 0; k < depth; ++k) {
      const lanes factor = load(right.data + k * right.row_stride + c);
#pragma GCC unroll 8
      for (int r = 0; r < rows_together; ++r) {
        sum[r] += left.data[r * left.row_stride + k * left.column_stride] * factor;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows_together; ++r) store(sum[r], sums + r * sums_stride + c);
  }
}

inline void add_product(left_factor left, const right_factor& right, index_t rows, index_t depth,
                        index_t columns, float* sums, index_t sums_stride) noexcept {
  for (; rows >= 8; rows -= 8, sums += 8 * sums_stride, left.data += 8 * left.row_stride) {
    add_product_rows<8>(left, right, depth, columns, sums, sums_stride);
  }
  for (; rows > 0; --rows, sums += sums_stride, left.data += left.row_stride) {
    add_product_rows<1>(left, right, depth, columns, sums, sums_stride);
  }
}

/// Columns of a map that fit_map solves for together.
inline constexpr int map_columns = 32;

/// Writes the map of a ridge regression: from how much too large a key's logits are to how the key
/// must change. Replaces each row of X = x [row, dims], with dim_stride floats between rows, by
/// -(X^T X + ridge * tr(X^T X) / dims * I)^-1 times that row. Writes 0 if X is 0 or not finite.
/// Scratch: normal [dims, dims], solved [dims, map_columns]. O((rows + dims) * dims^2). Computes in
/// double, because the largest eigenvalue is up to dims / ridge times the smallest.
inline void fit_map(float* x, index_t rows, index_t dims, index_t dim_stride, double ridge,
                    double* normal, double* solved) noexcept {
  const auto vector = [](double* data, index_t count) {
    return Eigen::Map<Eigen::ArrayXd>(data, static_cast<Eigen::Index>(count));
  };
  std::fill_n(normal, dims * dims, 0.0);
  for (index_t r = 0; r < rows; ++r) {
    for (index_t d = 0; d < dims; ++d) solved[d] = static_cast<double>(x[r * dim_stride + d]);
    for (index_t i = 0; i < dims; ++i) {
      vector(normal + i * dims, i + 1) += solved[i] * vector(solved, i + 1);
    }
  }
  double trace = 0;
  for (index_t i = 0; i < dims; ++i) trace += normal[i * dims + i];
  if (!(trace > 0 && std::isfinite(trace))) {
    std::fill_n(x, rows * dim_stride, 0.0f);
    return;
  }
  // The Cholesky factor overwrites the matrix, row by row.
  for (index_t i = 0; i < dims; ++i) {
    double* row = normal + i * dims;
    row[i] += ridge * trace / static_cast<double>(dims);
    for (index_t k = 0; k <= i; ++k) {
      const double rest = row[k] - (vector(row, k) * vector(normal + k * dims, k)).sum();
      row[k] = k < i ? rest / normal[k * dims + k] : std::sqrt(rest);
    }
  }
  using columns = Eigen::Map<Eigen::Array<double, map_columns, 1>>;
  const auto solution = [&](index_t i) { return columns(solved + i * map_columns); };
  for (index_t first = 0; first < rows; first += map_columns) {
    const index_t count = (std::min)(rows - first, index_t{map_columns});
    for (index_t i = 0; i < dims; ++i) {
      for (index_t c = 0; c < map_columns; ++c) {
        solved[i * map_columns + c] =
            c < count ? static_cast<double>(x[(first + c) * dim_stride + i]) : 0;
      }
    }
    for (index_t i = 0; i < dims; ++i) {
      columns own = solution(i);
      for (index_t k = 0; k < i; ++k) own -= normal[i * dims + k] * solution(k);
      own /= normal[i * dims + i];
    }
    for (index_t i = dims - 1; i >= 0; --i) {
      columns own = solution(i);
      for (index_t k = i + 1; k < dims; ++k) own -= normal[k * dims + i] * solution(k);
      own /= normal[i * dims + i];
    }
    for (index_t c = 0; c < count; ++c) {
      for (index_t i = 0; i < dims; ++i) {
        x[(first + c) * dim_stride + i] = static_cast<float>(-solved[i * map_columns + c]);
      }
    }
  }
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
