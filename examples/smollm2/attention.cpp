// SPDX-License-Identifier: Apache-2.0
// Attention by blocks of queries: the scores of one block and one head are all that is ever stored.
#include "attention.hpp"

#include <algorithm>
#include <cmath>

#include "matrix.hpp"

namespace smollm2 {
namespace {

// Rows of a block share one product with the keys, of which the last block_tokens - 1 columns are
// computed in vain for the first row: large enough for the former, small enough for the latter.
constexpr std::size_t block_tokens = 128;

// Softmax over the first `visible` elements of a row, without the division; the others become 0.
// Returns the sum to divide by.
float exponentiate(Eigen::Ref<row_vector> row, Eigen::Index visible) {
  auto scores = row.head(visible).array();
  scores = (scores - scores.maxCoeff()).exp();
  row.tail(row.size() - visible).setZero();
  return scores.sum();
}

}  // namespace

void attend(std::span<const float> queries, std::size_t q_heads, const layer_memory& cache,
            int threads, std::span<float> output) {
  const std::size_t head_dim = cache.head_dim();
  const std::size_t row = q_heads * head_dim;
  const std::size_t tokens = queries.size() / row;
  const std::size_t group = q_heads / cache.kv_heads();
  const std::size_t blocks = (tokens + block_tokens - 1) / block_tokens;
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));

#pragma omp parallel num_threads(threads)
  {
    matrix scores;  // [token, row]
#pragma omp for collapse(2) schedule(dynamic)
    for (std::size_t block = 0; block < blocks; ++block) {
      for (std::size_t q_head = 0; q_head < q_heads; ++q_head) {
        const std::size_t kv_head = q_head / group;
        const std::size_t begin = block * block_tokens;
        const std::size_t count = std::min(block_tokens, tokens - begin);
        const std::size_t older = cache.length(kv_head) - tokens;  // rows that all tokens see
        const std::size_t rows = older + begin + count;
        const std::size_t offset = begin * row + q_head * head_dim;

        const const_strided_rows q(queries.data() + offset, index(count), index(head_dim),
                                   Eigen::OuterStride<>(index(row)));
        strided_rows out(output.data() + offset, index(count), index(head_dim),
                         Eigen::OuterStride<>(index(row)));

        // Calls f(first row, keys or values [row, head_dim]) for each part that lies together.
        const auto for_each_part = [&](const float* kv_rows::*member, const auto& f) {
          for (std::size_t next = 0; next < rows;) {
            const kv_rows part = cache.rows_from(kv_head, next);
            const std::size_t size = std::min(part.count, rows - next);
            f(index(next), Eigen::Map<const matrix>(part.*member, index(size), index(head_dim)));
            next += size;
          }
        };
        scores.resize(index(count), index(rows));
        for_each_part(&kv_rows::keys, [&](Eigen::Index first, const auto& k) {
          scores.middleCols(first, k.rows()).noalias() = (scale * q) * k.transpose();
        });
        Eigen::VectorXf sums(index(count));
        for (Eigen::Index token = 0; token < index(count); ++token) {
          sums[token] = exponentiate(scores.row(token), index(older + begin) + token + 1);
        }
        out.setZero();
        for_each_part(&kv_rows::values, [&](Eigen::Index first, const auto& v) {
          out.noalias() += scores.middleCols(first, v.rows()) * v;
        });
        out.array().colwise() /= sums.array();
      }
    }
  }
}

}  // namespace smollm2
