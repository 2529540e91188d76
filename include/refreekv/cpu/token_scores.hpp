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

/// Sums of attention over query rows, in attention_scratch.
template <class Layer>
struct head_sums {
  const Layer& layer;
  const attention_scratch& scratch;

  [[nodiscard]] index_t group() const noexcept { return layer.q_heads() / layer.kv_heads(); }
  /// Sums of a power of the attention: 0 for the attention itself, 1 for its squares. [token]
  [[nodiscard]] double* of(index_t slot, index_t power, index_t q_head) const noexcept {
    return scratch.sums + ((slot * 2 + power) * group() + q_head) * layer.capacity();
  }
  void set_zero(const attended_chunk& at, index_t power) const noexcept {
    const auto [begin, end] = at.place.tokens;
    for (index_t g = 0; g < group(); ++g) {
      std::fill_n(of(at.slot, power, g) + begin, end - begin, 0.0);
    }
  }
  void add(const attended_chunk& at, const row_attention& row) const noexcept {
    add_wide(row.values, row.tokens.end - row.tokens.begin,
             of(at.slot, 0, row.q_head) + row.tokens.begin,
             [&](const auto& x) { return x * row.weight; });
  }
};

/// Scores of tokens: the attention of the last rows.
template <class Layer>
struct sum_scores {
  head_sums<Layer> sums;
  const score_rows& summed;
  const scores_view<>& scores;
  const view<kept_tokens, 2>& counts;

  void start(const attended_chunk& at) const noexcept { sums.set_zero(at, 0); }
  void add(const attended_chunk& at, const row_attention& row) const noexcept { sums.add(at, row); }
  void finish(const attended_chunk& at, index_t left_out) const noexcept {
    const auto& [s, kv_head, tokens] = at.place;
    const query_window window = window_of(sums.layer, s, summed.rows);
    if (at.chunk == 0) {
      counts(s, kv_head).undecided = left_out > 0 || (!summed.carried && window.is_blind());
    }
    const index_t group = sums.group(), heads = scores.extent(1) / sums.layer.kv_heads();
    const index_t fresh = window.first_new_token();  // no carried score from here on
    const double share = heads == 1 ? 1 / static_cast<double>(group) : 1;
    for (index_t h = 0; h < heads; ++h) {
      for (index_t t = tokens.begin; t < tokens.end; ++t) {
        double all = sums.of(at.slot, 0, h)[t];
        for (index_t g = 1; heads == 1 && g < group; ++g) all += sums.of(at.slot, 0, g)[t];
        float& score = scores(s, kv_head * heads + h, t);
        const auto sum = static_cast<float>(all * share);
        score = summed.carried && t < fresh ? score + sum : sum;
      }
    }
  }
};

template <class Executor, class Layer>
void attention_sums(const Executor& threads, const score_rows& summed, const Layer& layer,
                    const scores_view<>& scores, const view<kept_tokens, 2>& counts,
                    const attention_scratch& scratch) noexcept {
  for_each_attention(threads, layer, summed.rows,
                     summed.carried ? bad_rows::left_out : bad_rows::stay, scratch,
                     sum_scores<Layer>{{layer, scratch}, summed, scores, counts});
}

/// Returns the entropy of attention [count].
[[nodiscard]] inline double entropy_of(const float* attention, index_t count) noexcept {
  const Eigen::Map<const Eigen::ArrayXf> a(attention, static_cast<Eigen::Index>(count));
  return -static_cast<double>((a * (a + 1e-10f).log()).sum());
}

/// Scores of tokens: the mean and the spread of the last rows' attention. Of each chunk, writes to
/// attention_scratch::totals the entropies of the query heads and the variance.
template <class Layer>
struct spread_scores {
  head_sums<Layer> sums;
  index_t window, recent;
  double gain;
  const scores_view<>& scores;
  const view<kept_tokens, 2>& counts;

  [[nodiscard]] index_t scored(index_t sequence) const noexcept {
    return std::max<index_t>(0, sums.layer.tokens(sequence) - recent);
  }
  [[nodiscard]] double* totals(index_t sequence, index_t kv_head, index_t chunk) const noexcept {
    const attention_scratch& scratch = sums.scratch;
    return scratch.totals +
           ((sequence * sums.layer.kv_heads() + kv_head) * scratch.chunks + chunk) *
               (sums.group() + 1);
  }
  void start(const attended_chunk& at) const noexcept {
    sums.set_zero(at, 0);
    sums.set_zero(at, 1);
    std::fill_n(totals(at.place.sequence, at.place.kv_head, at.chunk), sums.group() + 1, 0.0);
  }
  void add(const attended_chunk& at, row_attention row) const noexcept {
    row.tokens.end = (std::min)(row.tokens.end, scored(at.place.sequence));
    const auto [begin, end] = row.tokens;
    if (begin >= end) return;
    float attention[static_cast<std::size_t>(chunk_tokens)];
    for (index_t t = 0; t < end - begin; ++t) {
      attention[t] = row.values[t] * static_cast<float>(row.weight);
    }
    // Sums of the same floats, so that the spread of equal rows is 0.
    add_wide(attention, end - begin, sums.of(at.slot, 0, row.q_head) + begin,
             [](const auto& x) { return x; });
    add_wide(attention, end - begin, sums.of(at.slot, 1, row.q_head) + begin,
             [](const auto& x) { return x * x; });
    totals(at.place.sequence, at.place.kv_head, at.chunk)[row.q_head] +=
        entropy_of(attention, end - begin);
  }
  void finish(const attended_chunk& at, index_t left_out) const noexcept {
    const auto& [s, kv_head, tokens] = at.place;
    const query_window existing = window_of(sums.layer, s, window);
    if (at.chunk == 0) counts(s, kv_head).undecided = left_out > 0 || existing.is_blind();
    const auto n = static_cast<double>(std::max<index_t>(1, existing.count() - left_out));
    double& variance = totals(s, kv_head, at.chunk)[sums.group()];
    for (index_t t = tokens.begin; t < (std::min)(tokens.end, scored(s)); ++t) {
      double score = 0;
      for (index_t g = 0; g < sums.group(); ++g) {
        const double sum = sums.of(at.slot, 0, g)[t], mean = sum / n;
        double spread = n < 2 ? 0 : (sums.of(at.slot, 1, g)[t] - mean * sum) / (n - 1);
        if (spread < 0) spread = 0;
        variance += spread;
        score += mean + gain * spread;
      }
      scores(s, kv_head, t) = static_cast<float>(score / static_cast<double>(sums.group()));
    }
  }
};

template <class Executor, class Layer>
void attention_spread(const Executor& threads, index_t window, index_t recent, double gain,
                      const Layer& layer, const scores_view<>& scores,
                      const view<kept_tokens, 2>& counts, double* totals,
                      const attention_scratch& scratch) noexcept {
  const spread_scores<Layer> spread{{layer, scratch}, window, recent, gain, scores, counts};
  for_each_attention(threads, layer, window, bad_rows::left_out, scratch, spread);
  for (index_t s = 0; s < layer.sequences(); ++s) {
    totals[2 * s] = totals[2 * s + 1] = 0;
    for (index_t h = 0; h < layer.kv_heads(); ++h) {
      double entropy = 0;
      for (index_t c = 0; c < chunking{layer.tokens(s), 0}.count(); ++c) {
        const double* own = spread.totals(s, h, c);
        for (index_t g = 0; g < spread.sums.group(); ++g) entropy += own[g];
        totals[2 * s + 1] += own[spread.sums.group()];
      }
      totals[2 * s] += entropy < 0 ? 0 : entropy;  // negative if a ready row exceeds 1, for example
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
