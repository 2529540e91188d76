// SPDX-License-Identifier: Apache-2.0
// Logits of a window of queries against a range of keys, whatever the keys' type and layout.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "refreekv/cpu/element.hpp"
#include "refreekv/norm_scan.hpp"
#include "refreekv/observation.hpp"

namespace refreekv::inline v0::cpu_detail {

using row_map = Eigen::Map<Eigen::ArrayXf>;

/// A register tile: out [row, token] = queries [row, dim] . keys [token, dim].
template <index_t rows, index_t tokens, class T>
void dot_tile(const T* keys, index_t token_stride, const float* queries, index_t dim, float* out,
              index_t out_stride) noexcept {
  lane_array sums[std::size_t{rows}][std::size_t{tokens}];
  for (auto& row : sums) {
    for (lane_array& sum : row) sum.setZero();
  }
  index_t d = 0;
  for (; d + lanes <= dim; d += lanes) {
    lane_array key[std::size_t{tokens}];
    for (index_t t = 0; t < tokens; ++t) {
      key[t] = load(keys + t * token_stride + d);
    }
    for (index_t r = 0; r < rows; ++r) {
      const lane_array query = Eigen::Map<const lane_array>(queries + r * dim + d);
      for (index_t t = 0; t < tokens; ++t) sums[r][t] += query * key[t];
    }
  }
  for (index_t r = 0; r < rows; ++r) {
    for (index_t t = 0; t < tokens; ++t) {
      float sum = sums[r][t].sum();
      for (index_t i = d; i < dim; ++i) {
        sum += queries[r * dim + i] * widen(keys[t * token_stride + i]);
      }
      out[r * out_stride + t] = sum;
    }
  }
}

/// out [row, token] for any number of rows.
template <index_t tokens, class T>
void dot_rows(const T* keys, index_t token_stride, const float* queries, index_t rows, index_t dim,
              float* out, index_t out_stride) noexcept {
  index_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    dot_tile<4, tokens>(keys, token_stride, queries + r * dim, dim, out + r * out_stride,
                        out_stride);
  }
  for (; r < rows; ++r) {
    dot_tile<1, tokens>(keys, token_stride, queries + r * dim, dim, out + r * out_stride,
                        out_stride);
  }
}

/// Tokens whose keys are gathered at a time where head_dim is not contiguous.
inline constexpr index_t gather_tokens = 4;

/// tile [row, chunk_tokens] = queries [row, dim] . keys [range]. gathered: [gather_tokens, dim].
template <kv_source Keys>
void dot_range(const Keys& keys, index_t sequence, index_t kv_head, token_range range,
               const float* queries, index_t rows, float* gathered, float* tile) noexcept {
  static_assert(element<std::remove_const_t<typename Keys::element_type>>,
                "keys are float, half or bfloat16 (Eigen's types, f16_bits or bf16_bits)");
  const index_t dim = keys.head_dim();
  for (index_t token = range.begin; token < range.end;) {
    const auto run = keys.run_at(sequence, kv_head, token);
    const auto* data = static_cast<const typename Keys::element_type*>(run.data);
    const index_t count = std::min(run.tokens, range.end - token);
    float* out = tile + (token - range.begin);
    for (index_t t = 0; t < count;) {
      const index_t step = t + gather_tokens <= count ? gather_tokens : 1;
      const auto dot = [&](const auto* rows_of_keys, index_t token_stride) {
        if (step == 1) {
          dot_rows<1>(rows_of_keys, token_stride, queries, rows, dim, out + t, chunk_tokens);
        } else {
          dot_rows<gather_tokens>(rows_of_keys, token_stride, queries, rows, dim, out + t,
                                  chunk_tokens);
        }
      };
      if (run.dim_stride == 1) {
        dot(data + t * run.token_stride, run.token_stride);
      } else {
        for (index_t i = 0; i < step * dim; ++i) {
          gathered[i] = widen(data[(t + i / dim) * run.token_stride + i % dim * run.dim_stride]);
        }
        dot(gathered, dim);
      }
      t += step;
    }
    token += count;
  }
}

/// Queries as floats, [sequence, q_head, window, head_dim]: the last `window` rows of each.
template <class Query, class Keys>
void pack_queries(const query_observation<Query, Keys>& seen, index_t sequence, index_t q_head,
                  index_t window, float* packed) noexcept {
  const index_t dim = seen.head_dim();
  const index_t stride = seen.queries.stride(3);
  for (index_t r = 0; r < window; ++r) {
    const Query* query = seen.queries.at(sequence, seen.window() - window + r, q_head);
    for (index_t d = 0; d < dim; ++d) packed[r * dim + d] = widen(query[d * stride]);
  }
}

/// Turns q.k of one row into logits, -inf where the row does not see the token.
template <class Query, class Keys>
void finish_logits(const query_observation<Query, Keys>& seen, const query_window& window,
                   index_t q_head, index_t row, token_range range, float* logits) noexcept {
  const auto& params = seen.info.attention;
  row_map x(logits, range.end - range.begin);
  x *= seen.scale();
  if (params.soft_cap > 0) {
    // In double: a soft cap of 50 would turn float tanh's last digit into 3e-6 of a logit.
    const double cap = params.soft_cap;
    for (float& logit : x) logit = static_cast<float>(cap * std::tanh(double{logit} / cap));
  }
  const token_range visible = window.visible(row);
  if (params.alibi_slopes.data() != nullptr) {
    const double slope = params.alibi_slopes(q_head);
    for (index_t t = range.begin; t < range.end; ++t) {
      float& logit = x(t - range.begin);
      logit = static_cast<float>(logit + slope * static_cast<double>(t - (visible.end - 1)));
    }
  }
  const float hidden = -std::numeric_limits<float>::infinity();
  const index_t first = std::clamp(visible.begin, range.begin, range.end) - range.begin;
  const index_t last = std::clamp(visible.end, range.begin, range.end) - range.begin;
  if (first > 0) x.head(first).setConstant(hidden);
  if (last < x.size()) x.tail(x.size() - last).setConstant(hidden);
}

}  // namespace refreekv::inline v0::cpu_detail
