// SPDX-License-Identifier: Apache-2.0
// Scores of tokens by the attention that they receive, and quotas: how many tokens stay.
#pragma once

#include <cmath>

#include "refreekv/core/view.hpp"

namespace refreekv::inline v0 {

/// How a token's score is pooled with the scores of its neighbours.
enum class pool_kind {
  average,  ///< the sum of the scores over `width`, also where neighbours are missing
  max,      ///< the largest of the scores that exist
};

/// Pooling over the `width` tokens around each token. `width` is odd; 1 keeps scores unchanged.
struct pooling {
  pool_kind kind = pool_kind::average;
  count_t width = 5;

  [[nodiscard]] constexpr bool valid() const noexcept {
    return width % 2 == 1 && width <= max_count;
  }
};

namespace detail {

/// The pooled score of token t, from scores [count] with a stride. NaN stays NaN. O(width).
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

/// The tokens that a sequence keeps: its last `recent` tokens, and of the tokens before them the
/// `ranked` tokens with the highest scores. Among equals the earlier ones stay. All tokens stay if
/// there are no more than that.
struct token_quota {
  index_t ranked;
  index_t recent;

  /// The quota that keeps every token.
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr token_quota all() noexcept {
    return {max_count, 0};
  }
  /// A quota of `budget` tokens in all. The last `recent` tokens stay whatever the budget is. The
  /// newest token always stays, because nothing could attend to an empty cache.
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr token_quota of(index_t budget,
                                                                     index_t recent) noexcept {
    if (budget < 1 && recent < 1) return {0, 1};
    return {budget > recent ? budget - recent : 0, recent};
  }
  /// The quota of one of the KV heads that share a quota. Each head owns the share `floor` of it.
  /// The rest of all heads' quotas goes to the heads with the best tokens; `best` is how many of
  /// these tokens are in this head. The number of tokens is rounded to the nearest one, from
  /// halfway to the even one.
  [[nodiscard]] REFREEKV_HOST_DEVICE token_quota of_head(double floor,
                                                         index_t best) const noexcept {
    // One rounding: some compilers would fuse a product and a sum, and others would not.
    const double share =
        std::fma(floor, static_cast<double>(ranked - best), static_cast<double>(best));
    return {static_cast<index_t>(std::rint(share)), recent};
  }
};

/// The quota of each KV head: [sequence, kv_head].
template <class Memory = host_memory>
using quotas_view = view<const token_quota, 2, Memory>;

namespace detail {

/// The quotas of a layer whose KV heads each have their sequence's quota; quotas [sequence].
template <class Layer>
[[nodiscard]] constexpr quotas_view<typename Layer::memory> quotas_by_sequence(
    const token_quota* quotas, const Layer& layer) noexcept {
  return {quotas, {layer.sequences(), layer.kv_heads()}, {1, 0}};
}

}  // namespace detail

/// Scores of each sequence's heads: [sequence, head, token].
template <class Memory = host_memory>
using scores_view = view<float, 3, Memory>;

/// What happens to a row without a softmax.
enum class bad_rows {
  stay,      ///< its attention is NaN
  left_out,  ///< its attention is 0, in all query heads of the KV head
};

/// The rows over which a score is summed.
struct score_rows {
  index_t rows;  ///< the last rows of the layer's window; in a shorter sequence those that exist
  /// Whether tokens keep their old score, to which the sum is added. Tokens whose own row exists
  /// are new: they have no old score, unless rows have ends.
  bool carried = false;
};

}  // namespace refreekv::inline v0
