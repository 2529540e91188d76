// SPDX-License-Identifier: Apache-2.0
// Scores that tokens earn by the attention they receive, and what is kept by them.
#pragma once

#include <cmath>

#include "refreekv/core/view.hpp"

namespace refreekv::inline v0 {

/// How a token's score takes in those of its neighbours.
enum class pool_kind {
  average,  ///< their sum over `width`, also where some are missing
  max,      ///< the largest of those there are
};

/// Over `width` tokens around each one, an odd number; 1 leaves scores as they are.
struct pooling {
  pool_kind kind = pool_kind::average;
  count_t width = 5;

  [[nodiscard]] constexpr bool valid() const noexcept {
    return width % 2 == 1 && width <= max_count;
  }
};

namespace detail {

/// The pooled score of token t, of scores [count] with a stride. NaN stays. O(width).
[[nodiscard]] REFREEKV_HOST_DEVICE inline float pooled_score(const pooling& pool, index_t count,
                                                             const float* scores, index_t stride,
                                                             index_t t) noexcept {
  const index_t reach = (index_t{pool.width} - 1) / 2;
  const index_t first = t < reach ? 0 : t - reach;
  const index_t last = count - t > reach ? t + reach : count - 1;
  double sum = 0;
  float most = scores[t * stride];
  for (index_t i = first; i <= last; ++i) {
    const float score = scores[i * stride];
    sum += static_cast<double>(score);
    if (score > most) most = score;
  }
  if (pool.kind == pool_kind::average || std::isnan(sum)) {
    return static_cast<float>(sum / static_cast<double>(pool.width));
  }
  return most;
}

}  // namespace detail

/// What a sequence keeps: its last `recent` tokens, and of those before them the `ranked` with the
/// highest scores, the earlier ones among equals. All where there are no more than that.
struct token_quota {
  index_t ranked;
  index_t recent;

  /// Everything.
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr token_quota all() noexcept {
    return {max_count, 0};
  }
  /// `budget` tokens in all, of which the last `recent` are safe whatever the budget is. The newest
  /// token always is: nothing could attend to an empty cache.
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr token_quota of(index_t budget,
                                                                     index_t recent) noexcept {
    if (budget < 1 && recent < 1) return {0, 1};
    return {budget > recent ? budget - recent : 0, recent};
  }
  /// Of a KV head among those that share: `floor` of the quota is every head's own, and the rest of
  /// all heads goes where their best tokens are, `best` of them in this head. Rounded to the
  /// nearest number, the even one from halfway.
  [[nodiscard]] REFREEKV_HOST_DEVICE token_quota of_head(double floor,
                                                         index_t best) const noexcept {
    // In one rounding: some compilers would join the product and the sum, and others not.
    const double share =
        std::fma(floor, static_cast<double>(ranked - best), static_cast<double>(best));
    return {static_cast<index_t>(std::rint(share)), recent};
  }
};

/// What each KV head keeps: [sequence, kv_head].
template <class Memory = host_memory>
using quotas_view = view<const token_quota, 2, Memory>;

namespace detail {

/// Each keeps what its sequence's quota says; quotas [sequence].
template <class Layer>
[[nodiscard]] constexpr quotas_view<typename Layer::memory> quotas_by_sequence(
    const token_quota* quotas, const Layer& layer) noexcept {
  return {quotas, {layer.sequences(), layer.kv_heads()}, {1, 0}};
}

}  // namespace detail

/// Scores of each sequence's heads: [sequence, head, token].
template <class Memory = host_memory>
using scores_view = view<float, 3, Memory>;

/// What becomes of a row without a softmax.
enum class bad_rows {
  stay,      ///< its attention is NaN
  left_out,  ///< it is 0, in all query heads of the KV head
};

/// Which rows give a score.
struct score_rows {
  index_t rows;  ///< the last ones of the observation; of a shorter sequence those that exist
  /// Tokens keep what they had, but those whose own row exists: they are new, unless rows have
  /// ends.
  bool carried = false;
};

}  // namespace refreekv::inline v0
