// SPDX-License-Identifier: Apache-2.0
// A layer with scores that accumulate from one decoding step to the next.
#pragma once

#include "refreekv/attention/layer.hpp"
#include "refreekv/backend/token_scores.hpp"

namespace refreekv::inline v0 {

namespace detail {

template <class O>
[[nodiscard]] constexpr const char* invalid_scores(const scores_view<typename O::memory>& scores,
                                                   const O& layer) noexcept {
  if (scores.malformed() || scores.extent(0) != layer.sequences() ||
      scores.extent(1) != layer.kv_heads() || scores.extent(2) < layer.capacity()) {
    return "scores must be [sequence, kv_head, capacity]";
  }
  return nullptr;
}

}  // namespace detail

/// A layer with the accumulated scores of its tokens. The caller owns the scores.
template <model_layer Layer>
struct scored_layer : Layer {
  using plain_type = Layer;

  /// [sequence, kv_head, capacity]
  scores_view<typename Layer::memory> scores;

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (const char* why = Layer::invalid()) return why;
    return detail::invalid_scores(scores, *this);
  }
};

/// Returns the layer with scores [sequence, kv_head, capacity]. O(1).
template <model_layer Layer>
[[nodiscard]] constexpr auto with_scores(
    const Layer& layer, const scores_view<typename Layer::memory>& scores) noexcept {
  return scored_layer<Layer>{{layer}, scores};
}

}  // namespace refreekv::inline v0
