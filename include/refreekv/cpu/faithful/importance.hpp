// SPDX-License-Identifier: Apache-2.0
// Token scores of policy::faithful on the CPU: the importance of a token to its layer.
#pragma once

#include "refreekv/cpu/faithful/importance_rows.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Returns whether the queries of a KV head's rows are finite. Logits do not show this, because a
/// soft cap hides a query that is not.
template <class Query, class Keys>
[[nodiscard]] bool are_finite(const query_layer<Query, Keys>& layer, index_t sequence,
                              index_t kv_head, index_t rows) noexcept {
  const index_t heads = layer.q_heads() / layer.kv_heads();
  bool finite = true;
  for (index_t i = 0; i < heads * rows; ++i) {
    const Query* query =
        layer.queries.at(sequence, layer.window() - rows + i % rows, kv_head * heads + i / rows);
    for (index_t d = 0; d < layer.head_dim(); ++d) {
      finite &= std::isfinite(widen(query[d * layer.queries.stride(3)]));
    }
  }
  return finite;
}

/// Reads the keys once. Writes the normaliser of each row, and to `anchor` the mean direction of
/// the keys: a vector of length 1, or 0 if there is none. Returns whether all rows have a softmax.
template <class Layer, class Product>
bool find_anchor(const Layer& layer, index_t sequence, index_t kv_head,
                 const head_rows<Product>& rows, const importance_scratch::weighing_parts& work,
                 row_normaliser* normalisers) noexcept {
  const auto& plain = detail::plain(layer);
  const index_t dims = layer.head_dim(), count = rows.count();
  const index_t chunks = chunking{rows.window.tokens, 0}.count();
  double* anchor = work.anchor;
  std::fill_n(anchor, whole_registers(dims), 0.0);
  for (index_t i = 0; i < count * chunks; ++i) {
    work.statistics[i] = {-std::numeric_limits<float>::infinity(), 0, 0};
  }
  for_each_chunk(rows.window, sequence, kv_head,
                 [&](index_t c, const chunk_place& block, const chunk_place& next) {
                   attend_chunk(plain, rows.window, rows.queries.packed, block, next,
                                output::statistics, work.tile);
                   for (index_t i = 0; i < count; ++i) {
                     work.statistics[i * chunks + c] = work.tile.statistics[i];
                   }
                   for_each_row(plain.keys, sequence, kv_head, block.tokens, work.row,
                                [&](index_t, const float* key) {
                                  const double length = length_of_row(key, dims);
                                  if (length <= 0) return;  // a key without a direction
                                  constexpr index_t step = lane_count / 2;
                                  for (index_t d = 0; d < dims; d += step) {
                                    store(load_wide(anchor + d) + load_wide(key + d) * (1 / length),
                                          anchor + d);
                                  }
                                });
                 });
  double square = 0;
  for (index_t d = 0; d < dims; ++d) square += anchor[d] * anchor[d];
  const double length = std::sqrt(square);
  for (index_t d = 0; d < dims; ++d) {
    anchor[d] *= detail::has_direction(length, rows.window.tokens) ? 1 / length : 0;
  }
  const auto& sinks = plain.info.attention.sink_logits;
  bool exist = true;
  for (index_t i = 0; i < count; ++i) {
    const index_t q_head = rows.queries.first_head + i / rows.window.rows;
    normalisers[i] = detail::normalise(
        work.statistics + i * chunks, chunks,
        sinks.data() != nullptr ? sinks(q_head) : -std::numeric_limits<float>::infinity());
    exist &= normalisers[i].exists();
  }
  return exist;
}

/// Adds to spread [token] the standard deviation of the bare logits over the rows, summed over
/// query heads.
inline void add_spread(const float* logits, index_t heads, index_t rows, index_t tokens,
                       float* spread) noexcept {
  using row = Eigen::Map<const Eigen::ArrayXf>;
  float sums[static_cast<std::size_t>(chunk_tokens)],
      squares[static_cast<std::size_t>(chunk_tokens)];
  const auto size = static_cast<Eigen::Index>(tokens);
  Eigen::Map<Eigen::ArrayXf> sum(sums, size), square(squares, size), result(spread, size);
  const float share = 1 / static_cast<float>(rows);
  for (index_t g = 0; g < heads; ++g) {
    // Relative to the first row, because squares of logits that lie close together would cancel.
    const row first(logits + g * rows * tile_stride, size);
    sum.setZero();
    square.setZero();
    for (index_t r = 1; r < rows; ++r) {
      const row own(logits + (g * rows + r) * tile_stride, size);
      sum += own - first;
      square += (own - first).square();
    }
    const auto variance = square * share - (sum * share).square();
    result += (variance.max)(0.0f).sqrt();
  }
}

template <class Executor, class Layer>
void weigh_tokens(const Executor& threads, const importance_rule& rule, const Layer& layer,
                  const scores_view<>& scores, const view<kept_tokens, 2>& counts,
                  const importance_scratch& scratch) noexcept {
  const auto& plain = detail::plain(layer);
  for_each_head(
      threads, plain.shape(), attention_work(plain, rule.rows),
      [&](int worker, index_t s, index_t h) {
        const auto work = scratch.weighing(worker, rule, layer);
        const auto rows = scratch.pack_head(rule, layer, s, h, work.packed);
        const index_t dims = layer.head_dim(), value_dims = layer.values.shape().head_dim;
        const query_window& window = rows.window;
        const auto heads = static_cast<double>(rows.queries.heads);
        bool& undecided = counts(s, h).undecided;
        undecided = window.is_blind() || !are_finite(plain, s, h, window.rows);
        if (window.tokens == 0 || undecided) return;
        undecided =
            !find_anchor(layer, s, h, rows, work, scratch.normalisers_of(rule, layer, s, h));
        if (undecided) return;

        const auto [begin, end] = importance_rule::seen_by(window);
        const token_range typical = importance_rule::typical(window);
        double squared_spread = 0;
        for_each_chunk(
            window, s, h, [&](index_t, const chunk_place& block, const chunk_place& next) {
              const index_t first = block.tokens.begin, last = block.tokens.end,
                            count = last - first;
              rows.fill_bare_logits(chunk_addresses(plain.keys, block, next), work.tile);

              constexpr auto most = static_cast<std::size_t>(chunk_tokens);
              float spread[most] = {};
              add_spread(work.tile.values, rows.queries.heads, window.rows, count, spread);
              for (index_t t = (std::max)(first, typical.begin); t < (std::min)(last, typical.end);
                   ++t) {
                const double mean = static_cast<double>(spread[t - first]) / heads;
                squared_spread += mean * mean;
              }

              double peaks[most] = {};
              for (index_t i = 0; i < rows.count(); ++i) {  // also for tokens that no row sees
                const float* logits = work.tile.values + i * tile_stride;
                undecided |=
                    !Eigen::Map<const Eigen::ArrayXf>(logits, static_cast<Eigen::Index>(count))
                         .allFinite();
              }
              for (index_t g = 0; g < rows.queries.heads; ++g) {
                float peak[most] = {};
                for (index_t r = 0; r < window.rows; ++r) {
                  float* attention = work.tile.values + (g * window.rows + r) * tile_stride;
                  rows.attend(g * window.rows + r, block.tokens, attention);
                  for (index_t t = 0; t < count; t += lane_count) {
                    store(larger(load(peak + t), load(attention + t)), peak + t);
                  }
                }
                const float* last_row =
                    work.tile.values + ((g + 1) * window.rows - 1) * tile_stride;
                for (index_t t = 0; t < count; ++t) {
                  peaks[t] += static_cast<double>(peak[t]) +
                              rule.last_row * static_cast<double>(last_row[t]);
                }
              }

              for_each_row(plain.keys, s, h, block.tokens, work.row,
                           [&](index_t t, const float* key) {
                             const double length = length_of_row(key, dims);
                             const double along = wide_dot(key, work.anchor, dims);
                             const double distance =
                                 length > 0 || std::isnan(length) ? 1 - along / length : 1;
                             double& weight = peaks[t - first];
                             weight = (weight / heads + rule.prior) * (distance < 0 ? 0 : distance);
                           });
              for_each_row(
                  layer.values, s, h, block.tokens, work.row, [&](index_t t, const float* value) {
                    scores(s, h, t) =
                        static_cast<float>(peaks[t - first] * length_of_row(value, value_dims));
                  });
            });

        // A single row has no spread. All heads then count the same.
        const double sigma =
            window.rows > 1
                ? std::sqrt(squared_spread / static_cast<double>(typical.end - typical.begin))
                : 1;
        for (index_t t = 0; t < begin; ++t) scores(s, h, t) = 0;
        for (index_t t = begin; t < end; ++t) {
          float& score = scores(s, h, t);
          score = static_cast<float>(static_cast<double>(score) * sigma);
          undecided |= !std::isfinite(score);
        }
      });
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
