// SPDX-License-Identifier: Apache-2.0
// Token scores on the CPU: attention summed over query rows, its spread, and pooling.
#pragma once

#include "refreekv/cpu/executor.hpp"
#include "refreekv/cpu/head_attention.hpp"
#include "refreekv/decision/kept_positions.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Calls f(worker, sequence, kv_head) for every KV head of every sequence. `work` is the cost of
/// one token, in elements.
template <class Executor, class F>
void for_each_head(const Executor& threads, const cache_shape& shape, index_t work,
                   const F& f) noexcept {
  const index_t kv_heads = shape.kv_heads, items = shape.sequences * kv_heads;
  const double elements =
      static_cast<double>(items) * static_cast<double>(shape.capacity) * static_cast<double>(work);
  for_each_item(threads, items, static_cast<index_t>((std::min)(elements, 1e18)),
                [&](int worker, index_t i) { f(worker, i / kv_heads, i % kv_heads); });
}

/// Returns the largest number of workers that for_each_head uses.
template <class Executor, class Layer>
[[nodiscard]] index_t head_workers(const Executor& threads, const Layer& layer) noexcept {
  return workers_for(threads, layer.sequences() * layer.kv_heads());
}

/// Returns the attention cost of one token, in elements: two products with the query rows of a KV
/// head, or one read of its ready rows.
template <class Layer>
[[nodiscard]] index_t attention_work(const Layer& layer, index_t rows) noexcept {
  const index_t group = layer.q_heads() / layer.kv_heads();
  if constexpr (has_queries<Layer>) {
    return (std::min)(rows, layer.capacity()) * group * layer.head_dim() / 8;
  } else {
    return (std::min)(rows, layer.capacity()) * group;
  }
}

template <class Executor, class Layer>
void attention_sums(const Executor& threads, const score_rows& summed, const Layer& layer,
                    const scores_view<>& scores, const view<kept_tokens, 2>& counts,
                    const attention_scratch& scratch) noexcept {
  const index_t group = layer.q_heads() / layer.kv_heads();
  const index_t heads = scores.extent(1) / layer.kv_heads();  // scores per KV head
  for_each_head(
      threads, layer.shape(), attention_work(layer, summed.rows),
      [&](int worker, index_t s, index_t kv_head) {
        const auto work = scratch.of(worker, layer);
        const index_t tokens = layer.tokens(s), capacity = layer.capacity();
        for (index_t h = 0; h < heads; ++h) {
          std::fill_n(work.sums + h * capacity, tokens, 0.0);
        }
        const query_window window = window_of(layer, s, summed.rows);
        const index_t left_out = for_each_attention(
            layer, s, kv_head, summed.rows, summed.carried ? bad_rows::left_out : bad_rows::stay,
            scratch, work, [&](index_t rows, token_range range, const float* values) {
              const auto count = static_cast<Eigen::Index>(range.end - range.begin);
              for (index_t g = 0; g < group; ++g) {
                float sum_of_rows[static_cast<std::size_t>(chunk_tokens)];
                Eigen::Map<Eigen::ArrayXf> sum(sum_of_rows, count);
                sum.setZero();
                for (index_t r = 0; r < rows; ++r) {
                  sum += Eigen::Map<const Eigen::ArrayXf>(values + (g * rows + r) * tile_stride,
                                                          count);
                }
                double* sums = work.sums + (heads == 1 ? 0 : g) * capacity + range.begin;
                Eigen::Map<Eigen::ArrayXd>(sums, count) += sum.template cast<double>();
              }
            });
        counts(s, kv_head).undecided = left_out > 0 || (!summed.carried && window.is_blind());
        const index_t fresh = window.first_new_token();  // no carried score from here on
        const double share = heads == 1 ? 1 / static_cast<double>(group) : 1;
        for (index_t h = 0; h < heads; ++h) {
          for (index_t t = 0; t < tokens; ++t) {
            float& score = scores(s, kv_head * heads + h, t);
            const auto sum = static_cast<float>(work.sums[h * capacity + t] * share);
            score = summed.carried && t < fresh ? score + sum : sum;
          }
        }
      });
}

template <class Executor, class Layer>
void attention_spread(const Executor& threads, index_t window, index_t recent, double gain,
                      const Layer& layer, const scores_view<>& scores,
                      const view<kept_tokens, 2>& counts, double* totals,
                      const attention_scratch& scratch) noexcept {
  const index_t group = layer.q_heads() / layer.kv_heads();
  for_each_head(
      threads, layer.shape(), attention_work(layer, window),
      [&](int worker, index_t s, index_t kv_head) {
        const auto work = scratch.of(worker, layer);
        const index_t tokens = layer.tokens(s), capacity = layer.capacity();
        const query_window existing = window_of(layer, s, window);
        const index_t scored = std::max<index_t>(0, tokens - recent);
        double* squares = work.sums + group * capacity;
        for (index_t g = 0; g < group; ++g) {
          std::fill_n(work.sums + g * capacity, scored, 0.0);
          std::fill_n(squares + g * capacity, scored, 0.0);
        }
        double entropy = 0, variance = 0;
        const index_t left_out = for_each_attention(
            layer, s, kv_head, window, bad_rows::left_out, scratch, work,
            [&](index_t rows, token_range range, const float* values) {
              const auto count =
                  static_cast<Eigen::Index>((std::min)(range.end, scored) - range.begin);
              if (count <= 0) return;
              for (index_t i = 0; i < group * rows; ++i) {
                const Eigen::Map<const Eigen::ArrayXf> a(values + i * tile_stride, count);
                const index_t at = i / rows * capacity + range.begin;
                const auto exact = a.template cast<double>();
                Eigen::Map<Eigen::ArrayXd>(work.sums + at, count) += exact;
                Eigen::Map<Eigen::ArrayXd>(squares + at, count) += exact.square();
                entropy -= static_cast<double>((a * (a + 1e-10f).log()).sum());
              }
            });
        counts(s, kv_head).undecided = left_out > 0 || existing.is_blind();
        const auto n = static_cast<double>(std::max<index_t>(1, existing.count() - left_out));
        for (index_t t = 0; t < scored; ++t) {
          double score = 0;
          for (index_t g = 0; g < group; ++g) {
            const double sum = work.sums[g * capacity + t], mean = sum / n;
            double spread = n < 2 ? 0 : (squares[g * capacity + t] - mean * sum) / (n - 1);
            if (spread < 0) spread = 0;
            variance += spread;
            score += mean + gain * spread;
          }
          scores(s, kv_head, t) = static_cast<float>(score / static_cast<double>(group));
        }
        double* own = scratch.totals + 2 * (s * layer.kv_heads() + kv_head);
        own[0] = entropy < 0 ? 0 : entropy;  // negative if a ready row exceeds 1, for example
        own[1] = variance;
      });
  for (index_t s = 0; s < layer.sequences(); ++s) {
    totals[2 * s] = totals[2 * s + 1] = 0;
    for (index_t i = s * layer.kv_heads(); i < (s + 1) * layer.kv_heads(); ++i) {
      totals[2 * s] += scratch.totals[2 * i];
      totals[2 * s + 1] += scratch.totals[2 * i + 1];
    }
  }
}

template <class Executor, class Layer>
void pool(const Executor& threads, const pooling& mode, const token_quota* quotas,
          const Layer& layer, const scores_view<>& scores, const scores_view<>& pooled) noexcept {
  for_each_head(threads, layer.shape(), index_t{mode.width}, [&](int, index_t s, index_t h) {
    const index_t count = std::max<index_t>(0, layer.tokens(s) - quotas[s].recent);
    for (index_t t = 0; t < count; ++t) {
      pooled(s, h, t) = detail::pooled_score(mode, count, scores.at(s, h), scores.stride(2), t);
    }
  });
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
