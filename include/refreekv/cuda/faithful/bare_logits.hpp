// SPDX-License-Identifier: Apache-2.0
// Bare logits (without mask and position bias) of tokens and rows that need not be contiguous, and
// the attention computed from them.
#pragma once

#include "refreekv/cuda/window_attention.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Every step-th row of `heads` query heads, numbered [q_head, row]. Interface of row_span.
struct stepped_span {
  int q_head;  ///< the first one
  int heads;
  int row;   ///< the first one, numbered in the window
  int rows;  ///< per query head
  int step;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr int count() const noexcept { return heads * rows; }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr int q_head_of(int i) const noexcept {
    return q_head + i / rows;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr int row_of(int i) const noexcept {
    return row + i % rows * step;
  }
};

/// As tile_place, but for a list of tokens instead of a range. The list has at most chunk_tokens
/// tokens and is shared by the block.
template <class Span>
struct listed_place {
  int sequence;
  int kv_head;
  Span span;
  int first;
  int count;
  const position_t* list;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr int size() const noexcept { return count; }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t token(int i) const noexcept {
    return list[i];
  }
};

/// The rows of a KV head that exist. Requires at least one.
[[nodiscard]] REFREEKV_DEVICE row_span rows_there(const query_window& window, index_t kv_head,
                                                  index_t group) noexcept {
  return {narrow(kv_head * group), narrow(group), narrow(window.first_row()),
          narrow(window.count())};
}

/// The model's soft cap, applied to logits.
struct logit_cap {
  double cap;      ///< 0: no cap
  double inverse;  ///< 1 / cap; 0 without a cap

  /// The branch keeps compilers from dividing when there is no cap.
  [[nodiscard]] static REFREEKV_DEVICE logit_cap of(float cap) noexcept {
    logit_cap c{double{cap}, 0};
    if (cap > 0) c.inverse = 1 / double{cap};
    return c;
  }
  [[nodiscard]] REFREEKV_DEVICE float operator()(float x) const noexcept {
    return cap > 0 ? detail::soft_capped(x, cap, inverse, std::exp(double{x} * (2 * inverse))) : x;
  }
};

/// Returns the attention of a row to a token, from the bare logit and the logarithm of the row's
/// sum of exponentials. Requires that the row sees the token.
template <class Memory>
[[nodiscard]] REFREEKV_DEVICE float attention_of(float logit, double log_sum,
                                                 const attention_params<Memory>& params,
                                                 const query_window& window, index_t q_head,
                                                 index_t row, index_t token) noexcept {
  float x = logit;
  if (params.alibi_slopes.data() != nullptr) {
    const double slope = params.alibi_slopes(q_head);
    x = static_cast<float>(x + slope * static_cast<double>(token - (window.position + row)));
  }
  return std::exp(static_cast<float>(double{x} - log_sum));
}

/// A row of a cache, whose elements are read as floats.
template <class Source>
struct cache_row {
  using element_type = std::remove_const_t<typename Source::element_type>;
  static_assert(sizeof(stored<element_type>) > 1,
                "the faithful rule reads keys and values of float, half or bfloat16");
  const element_type* data;
  index_t dim_stride;

  [[nodiscard]] static REFREEKV_DEVICE cache_row of(const Source& source, index_t sequence,
                                                    index_t kv_head, index_t token) noexcept {
    const auto run = source.run_at(sequence, kv_head, token);
    return {run.data, run.dim_stride};
  }
  [[nodiscard]] REFREEKV_DEVICE float operator[](index_t dim) const noexcept {
    return widen(data[dim * dim_stride]);
  }
};

/// Calls f(i, x) for every step-th i of [begin, end), where x is element `dim` of the row of
/// token(i). Loads are issued in batches, because the warp is latency-bound.
template <class Source, class Token, class F>
REFREEKV_DEVICE void for_each_element(const Source& source, index_t sequence, index_t kv_head,
                                      index_t dim, int begin, int end, int step, const Token& token,
                                      const F& f) noexcept {
  constexpr int batch = 8;
  REFREEKV_NO_UNROLL
  for (int first = begin; first < end; first += batch * step) {
    float x[batch];
    REFREEKV_UNROLL
    for (int u = 0; u < batch; ++u) {
      const int i = first + u * step;
      x[u] = i < end ? cache_row<Source>::of(source, sequence, kv_head, token(i))[dim] : 0;
    }
    REFREEKV_UNROLL
    for (int u = 0; u < batch; ++u) {
      if (first + u * step < end) f(first + u * step, x[u]);
    }
  }
}

/// Returns in lane i of a warp the sum of term(dim, x) over the elements x of the row of token
/// first + i. The warp reads the rows together. Requires count <= warp_threads. The result is
/// unspecified in lanes >= count.
template <class Source, thread_block Block, class Term>
[[nodiscard]] REFREEKV_DEVICE double sum_of_row(Block& block, const Source& source,
                                                index_t sequence, index_t kv_head, index_t first,
                                                int count, const Term& term) noexcept {
  constexpr int batch = 4;
  const int lane = lane_of(block);
  double own = 0;
  REFREEKV_NO_UNROLL
  for (int i = 0; i < count; i += batch) {
    cache_row<Source> rows[batch];
    double sums[batch] = {};
    REFREEKV_UNROLL
    for (int u = 0; u < batch; ++u) {
      const int row = i + u < count ? i + u : count - 1;
      rows[u] = cache_row<Source>::of(source, sequence, kv_head, first + row);
    }
    REFREEKV_NO_UNROLL
    for (index_t d = lane; d < source.shape().head_dim; d += warp_threads) {
      REFREEKV_UNROLL
      for (int u = 0; u < batch; ++u) sums[u] += term(d, double{rows[u][d]});
    }
    const double sum = block.template tile_reduce_scatter<warp_threads>(sums, plus{});
    const double of_lane = block.warp_broadcast(sum, lane % batch * (warp_threads / batch));
    if (lane / batch * batch == i) own = of_lane;
  }
  return own;
}

}  // namespace refreekv::inline v0::cuda_detail
