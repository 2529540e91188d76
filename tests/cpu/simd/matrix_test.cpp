// SPDX-License-Identifier: Apache-2.0
// Products and maps of small matrices against slow ones in double.
#include "refreekv/cpu/simd/matrix.hpp"

#include "catch.hpp"
#include "problem.hpp"

using namespace refreekv;
using namespace refreekv::cpu_detail;

namespace {

std::vector<float> random_floats(random_source& random, index_t count) {
  std::vector<float> out(static_cast<std::size_t>(count));
  for (float& x : out) x = random.normal();
  return out;
}

}  // namespace

TEST_CASE("a product is added to what is there, and to nothing else", "[cpu][matrix]") {
  random_source random(base_seed());
  for (const index_t rows : {1, 7, 8, 9, 33}) {
    for (const index_t depth : {0, 1, 5, 64}) {
      for (const index_t columns : {16, 48}) {
        INFO(rows << " x " << depth << " x " << columns);
        const index_t stride = columns + 16, left_stride = depth + 3;
        const auto left = random_floats(random, (rows + 1) * left_stride);
        const auto right = random_floats(random, (depth + 1) * stride);
        const auto before = random_floats(random, (rows + 1) * stride);
        for (const bool transposed : {false, true}) {
          std::vector<float> sums = before;
          const left_factor factor{left.data(), transposed ? 1 : left_stride,
                                   transposed ? rows + 1 : 1};
          if (transposed && (rows + 1) * depth > static_cast<index_t>(left.size())) continue;
          add_product(factor, {right.data(), stride}, rows, depth, columns, sums.data(), stride);
          for (index_t r = 0; r <= rows; ++r) {
            for (index_t c = 0; c < stride; ++c) {
              const auto at = static_cast<std::size_t>(r * stride + c);
              double expected = double{before[at]};
              for (index_t k = 0; k < depth && r < rows && c < columns; ++k) {
                expected += double{left[static_cast<std::size_t>(r * factor.row_stride +
                                                                 k * factor.column_stride)]} *
                            double{right[static_cast<std::size_t>(k * stride + c)]};
              }
              CHECK(std::abs(double{sums[at]} - expected) <= 1e-4);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("a dot product in double is exact to its last digits", "[cpu][matrix]") {
  random_source random(base_seed() + 1);
  for (const index_t dims : {1, 16, 20, 128}) {
    auto row = random_floats(random, whole_registers(dims));
    std::fill(row.begin() + dims, row.end(), 0.0f);
    row[0] = 1e30f;  // its square is no float
    double expected = 0;
    for (const float x : row) expected += double{x} * double{x};
    CHECK(std::abs(wide_dot(row.data(), row.data(), dims) / expected - 1) <= 1e-14);
  }
}

TEST_CASE("the map of a ridge regression solves its normal equations", "[cpu][matrix]") {
  random_source random(base_seed() + 2);
  for (const index_t dims : {1, 8, 33}) {
    for (const index_t rows : {1, 31, 32, 70}) {
      INFO(rows << " rows of " << dims);
      const index_t stride = whole_registers(dims);
      auto x = random_floats(random, rows * stride);
      for (index_t i = 0; i < rows * stride; ++i) {
        if (i % stride >= dims) x[static_cast<std::size_t>(i)] = 0;
      }
      std::vector<float> map = x;
      std::vector<double> normal(static_cast<std::size_t>(dims * dims)),
          solved(static_cast<std::size_t>(dims * map_columns));
      fit_map(map.data(), rows, dims, stride, 0.05, normal.data(), solved.data());
      const auto at = [&](const std::vector<float>& of, index_t r, index_t d) {
        return double{of[static_cast<std::size_t>(r * stride + d)]};
      };
      double trace = 0;
      for (const float v : x) trace += double{v} * double{v};
      for (index_t r = 0; r < rows; ++r) {
        for (index_t d = 0; d < dims; ++d) {
          double left = 0.05 * trace / static_cast<double>(dims) * at(map, r, d);
          for (index_t q = 0; q < rows; ++q) {
            double dot = 0;
            for (index_t k = 0; k < dims; ++k) dot += at(x, q, k) * at(map, r, k);
            left += dot * at(x, q, d);
          }
          CHECK(std::abs(left + at(x, r, d)) <= 1e-4);
        }
      }
    }
  }
  std::vector<float> zeros(16, 0.0f);
  std::vector<double> normal(256), solved(16 * map_columns);
  fit_map(zeros.data(), 1, 16, 16, 0.05, normal.data(), solved.data());
  CHECK(std::all_of(zeros.begin(), zeros.end(), [](float v) { return v == 0; }));
}
