// SPDX-License-Identifier: Apache-2.0
// The state that CAKE (arXiv 2503.12491) keeps across a model's layers, and the division of one
// budget among them.
#pragma once

#include <cmath>

#include "refreekv/attention/observe.hpp"
#include "refreekv/policy/scored_layer.hpp"

namespace refreekv::inline v0 {

/// The state that CAKE keeps across a model's layers. The caller owns all of its memory.
template <class Memory = host_memory>
struct cake_layers {
  /// [sequence, kv_head, capacity]: the scores of the layer that is passed. CAKE writes them at the
  /// layer's prefill. The caller compacts them with its cache, as a source of head_dim 1.
  scores_view<Memory> scores;
  view<double, 2, Memory> preferences;  ///< [sequence, layer], of the layers prefilled so far
  count_t finished = 0;                 ///< layers prefilled so far, this layer included
  lengths_view<Memory> prompts = {};  ///< [sequence]: tokens before any was dropped; null: none was
};

/// A layer with CAKE's state. For a layer that was prefilled before, pass observe(keys) without
/// queries: the state already holds its scores and its preference.
template <model_layer Layer>
struct cascaded_layer : Layer {
  using plain_type = Layer;

  cake_layers<typename Layer::memory> layers;

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (const char* why = Layer::invalid()) return why;
    const auto& [scores, preferences, finished, prompts] = layers;
    if (finished <= this->info.index) return "finished counts the observed layer, too";
    if (preferences.malformed() || preferences.extent(0) != this->sequences() ||
        preferences.extent(1) < finished) {
      return "preferences must be [sequence, layer]";
    }
    if (const char* why = invalid_lengths(prompts, this->sequences(), max_count)) return why;
    return detail::invalid_scores(scores, *this);
  }
};

/// Returns the layer with CAKE's state. O(1).
template <model_layer Layer>
[[nodiscard]] constexpr auto with_layers(
    const Layer& layer, const cake_layers<typename Layer::memory>& layers) noexcept {
  return cascaded_layer<Layer>{{layer}, layers};
}

namespace detail {

/// CAKE's budget, in tokens, of one of `count` layers. preferences: [count], with a stride. `total`
/// tokens are divided in proportion to the preferences and rounded down; a layer has at most
/// `available`. The tokens left over are spread evenly, the remainder to the first layers. The
/// division is uniform if a preference is negative or NaN, or if their sum is not positive and
/// finite (ours). O(count).
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t cake_budget(const double* preferences,
                                                                 index_t stride, index_t count,
                                                                 index_t layer, index_t total,
                                                                 index_t available) noexcept {
  double sum = 0;
  bool shared = true;
  for (index_t l = 0; l < count; ++l) {
    shared = shared && preferences[l * stride] >= 0;
    sum += preferences[l * stride];
  }
  shared = shared && sum > 0 && sum < HUGE_VAL;
  const auto proportional = [&](index_t l) {
    const double share = shared ? preferences[l * stride] / sum : 1 / static_cast<double>(count);
    return static_cast<index_t>(share * static_cast<double>(total));
  };

  index_t excess = 0, below = 0, assigned = 0;
  for (index_t l = 0; l < count; ++l) {
    const index_t budget = proportional(l);
    excess += budget > available ? budget - available : 0;
    below += budget < available ? 1 : 0;
    assigned += budget < available ? budget : available;
  }
  assigned += below > 0 ? excess : 0;
  // The part of `amount` that the rank-th of `takers` layers receives.
  const auto part = [](index_t amount, index_t takers, index_t rank) {
    return amount / takers + (rank < amount % takers ? 1 : 0);
  };
  const index_t missing = total > assigned ? total - assigned : assigned - total;
  const auto takes_missing = [&](index_t budget) {
    return total > assigned ? budget < available : total < assigned && budget > 1;
  };
  // Calls f(layer, budget) for each layer in order, with its budget of the second round.
  const auto for_each_budget = [&](const auto& f) {
    for (index_t l = 0, rank = 0; l < count; ++l) {
      const index_t budget = proportional(l);
      f(l, budget < available ? budget + part(excess, below, rank++) : available);
    }
  };
  index_t takers = 0;
  for_each_budget([&](index_t, index_t budget) { takers += takes_missing(budget) ? 1 : 0; });
  index_t result = 0, rank = 0;
  for_each_budget([&](index_t l, index_t budget) {
    const bool takes = takes_missing(budget);
    if (l == layer) {
      const index_t share = takes ? part(missing, takers, rank) : 0;
      result = total > assigned ? budget + share : budget - share;
    }
    rank += takes ? 1 : 0;
  });
  return result < 0 ? 0 : result < available ? result : available;
}

}  // namespace detail

}  // namespace refreekv::inline v0
