// SPDX-License-Identifier: Apache-2.0
// Eigen's row-major float32 matrices under this example's names, and the product with a weight.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <span>

namespace smollm2 {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using row_vector = Eigen::RowVectorXf;
using strided_rows = Eigen::Map<matrix, Eigen::Unaligned, Eigen::OuterStride<>>;
using const_strided_rows = Eigen::Map<const matrix, Eigen::Unaligned, Eigen::OuterStride<>>;

// Eigen counts in signed integers.
inline Eigen::Index index(std::size_t value) { return static_cast<Eigen::Index>(value); }

inline std::span<float> elements_of(matrix& m) {
  return {m.data(), static_cast<std::size_t>(m.size())};
}

// output[token, out] = input[token, in] * weight[out, in]^T. Each thread computes a range of output
// features. Eigen's own threads do the same for products of matrices, but leave a matrix-vector
// product, which is what decoding a token comes down to, on one core.
inline void project(const matrix& input, const matrix& weight, int threads, matrix& output) {
  output.resize(input.rows(), weight.rows());
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part) {
    const Eigen::Index begin = weight.rows() * part / threads;
    const Eigen::Index count = weight.rows() * (part + 1) / threads - begin;
    output.middleCols(begin, count).noalias() = input * weight.middleRows(begin, count).transpose();
  }
}

}  // namespace smollm2
