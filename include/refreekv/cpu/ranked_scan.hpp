// SPDX-License-Identifier: Apache-2.0
// The norm scan along a ranking by score, on the CPU.
#pragma once

#include "refreekv/cpu/top_tokens.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

template <class Executor, class Layer>
void rank_tokens(const Executor& threads, index_t recent, const Layer& layer,
                 const scores_view<>& scores, const scores_view<>& weights, position_t* order,
                 double* norms) noexcept {
  const index_t kv_heads = layer.kv_heads(), group = layer.q_heads() / kv_heads;
  const index_t capacity = layer.capacity();
  const auto candidates = [&](index_t s) { return std::max<index_t>(0, layer.tokens(s) - recent); };
  for_each_head(threads, layer.shape(), 16, [&](int, index_t s, index_t h) {
    position_t* row = order + (s * kv_heads + h) * capacity;
    const float* score = scores.at(s, h);
    const index_t stride = scores.stride(2);
    if (any_nan(score, stride, candidates(s))) {
      // NaN scores have no order. The norm of the whole sequence becomes NaN, which keeps all
      // tokens.
      row[0] = -1;
      return;
    }
    for (index_t t = 0; t < candidates(s); ++t) row[t] = static_cast<position_t>(t);
    std::sort(row, row + candidates(s), [&](position_t a, position_t b) {
      const float x = score[a * stride], y = score[b * stride];
      return x < y || (!(y < x) && a > b);
    });
  });
  for_each_item(threads, layer.sequences(), layer.sequences() * layer.q_heads() * capacity,
                [&](int, index_t s) {
                  double* norm = norms + s * capacity;
                  std::fill_n(norm, capacity, 0.0);
                  if (candidates(s) == 0) return;
                  for (index_t h = 0; h < layer.q_heads(); ++h) {
                    const position_t* row = order + (s * kv_heads + h / group) * capacity;
                    if (row[0] < 0) {
                      norm[0] = std::numeric_limits<double>::quiet_NaN();
                      return;
                    }
                    double energy = 0;
                    for (index_t i = candidates(s) - 1; i >= 0; --i) {
                      const auto weight = static_cast<double>(weights(s, h, row[i]));
                      energy += weight * weight;
                      norm[i] += std::sqrt(energy);
                    }
                  }
                });
}

template <class Executor, class Layer>
void stop_ranked(const Executor& threads, double threshold, index_t recent, const Layer& layer,
                 const double* norms, position_t* order, const kept_positions<>& kept) noexcept {
  for_each_head(threads, layer.shape(), 16, [&](int, index_t s, index_t h) {
    const index_t tokens = layer.tokens(s), capacity = layer.capacity();
    const index_t candidates = std::max<index_t>(0, tokens - recent);
    const double* norm = norms + s * capacity;
    if (candidates == 0) return keep_all(kept, s, h, tokens);
    if (!norm_scan::decidable(norm[0])) return keep_all(kept, s, h, tokens, true);
    norm_scan scan{};
    scan.threshold = threshold;
    const index_t cut = scan.last_allowed(norm, candidates, norm[0]);
    position_t* row = order + (s * layer.kv_heads() + h) * capacity;
    std::sort(row + cut, row + candidates);
    position_writer writer(kept, s, h);
    for (index_t i = cut; i < candidates; ++i) writer.append(row[i]);
    writer.append_range(candidates, tokens);
    writer.finish(tokens);
  });
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
