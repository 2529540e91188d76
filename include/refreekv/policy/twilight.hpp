// SPDX-License-Identifier: Apache-2.0
// Twilight (arXiv 2502.02770): for each query, keeps the fewest tokens that hold the share `mass`
// of its attention.
//
// Twilight is made for decoding: every step attends to a new set, and nothing is dropped from the
// cache. If the layer has page bounds, a selector (Quest) first narrows the tokens down to a few
// pages. If 4-bit keys are passed in place of the keys, attention is estimated from them. Each
// query head then selects the fewest tokens that hold `mass` of its attention (the paper's p). A KV
// head keeps the union over its query heads. Table 4 of arXiv 2502.16886 compares with Twilight
// applied once, to the last row of a prompt, and then compacted.
#pragma once

#include "refreekv/policy/policy.hpp"

namespace refreekv::inline v0::policy {

/// A step reads all of the layer: the selector narrows the kept tokens, not the read ones. Requires
/// the layer's number (layer_info::index), unless full_layers is 0.
struct twilight {
  template <class Memory>
  using decision = kept_positions<Memory>;

  double mass = 0.95;  ///< share of the attention to keep, in [0, 1]
  /// Tokens in the pages that the selector keeps for each query head.
  count_t selector_budget = 8192;
  /// Whether to keep the set of the published kernel. Its bisection starts at the first token's
  /// attention. If that is not the largest, the set is not minimal. If the selector dropped the
  /// first token, the set is every token that the selector kept.
  bool sink_start = false;
  count_t full_layers = 2;  ///< first layers, which attend to all tokens

  static constexpr const char* name = "twilight";
  static constexpr std::tuple options{
      option{"mass", &twilight::mass, "share of the attention that stays", any_share},
      option{"selector_budget", &twilight::selector_budget,
             "tokens in the pages that the selector keeps", at_least_one},
      option{"sink_start", &twilight::sink_start, "keep the set that the published kernel keeps"},
      option{"full_layers", &twilight::full_layers, "first layers that attend to all"}};

  /// Null, or the error that the layer's number is not set although full_layers is not 0. O(1).
  template <attention_layer Layer>
  [[nodiscard]] constexpr const char* invalid(const Layer& layer) const noexcept {
    return detail::needs_layer(layer, full_layers);
  }
  template <class Backend>
  struct buffers {
    float* weights;  ///< [sequence, q_head, capacity]
    typename ops<Backend>::attention_scratch attention;
    typename ops<Backend>::selection_scratch selection;
  };

  template <backend Backend, attention_layer Layer>
  [[nodiscard]] buffers<Backend> carve(arena& from, const Backend& exec,
                                       const Layer& layer) const noexcept {
    return {from.array<float>(layer.sequences(), layer.q_heads(), layer.capacity()),
            ops<Backend>::carve_attention_scratch(from, exec, detail::most_rows(layer, 1),
                                                  detail::plain(layer)),
            ops<Backend>::carve_selection_scratch(from, exec, layer)};
  }

  template <backend Backend, attention_layer Layer>
  status select(const Backend& exec, const Layer& layer, const buffers<Backend>& work,
                const decision<typename Layer::memory>& kept,
                const head_reduction auto&) const noexcept {
    using run = ops<Backend>;
    const auto& plain = detail::plain(layer);
    const scores_view<typename Layer::memory> weights(
        work.weights, {layer.sequences(), layer.q_heads(), layer.capacity()});
    if (detail::stays_whole(layer, full_layers)) return run::keep_all(exec, plain, kept);
    status s = run::attention_sums(exec, score_rows{detail::most_rows(layer, 1)}, plain, weights,
                                   kept.counts, work.attention);
    if constexpr (requires { layer.pages; }) {
      if (s == status::ok)
        s = run::select_pages(exec, layer.pages, selector_budget, plain, weights, work.selection);
    }
    if (s == status::ok)
      s = run::top_mass(exec, mass, sink_start, plain, weights, kept, work.selection);
    return s;
  }
};

}  // namespace refreekv::inline v0::policy
