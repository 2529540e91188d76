// SPDX-License-Identifier: Apache-2.0
// The scores of policy::faithful on a device: the importance of each token to its layer.
#pragma once

#include "refreekv/cuda/faithful/anchor.hpp"
#include "refreekv/cuda/faithful/check_rows.hpp"
#include "refreekv/cuda/faithful/ridge.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Writes the scores without their head's common factor sigma, a thread per token. Writes to
/// `spreads` each chunk's share of sigma, and to `attention`, if wanted, the mean over all rows.
template <class Layer, class Values, int Rows>
struct weigh_body {
  struct shared {
    cuda_detail::tile<Layer, Rows> tile;
    warp_values<double> sums;
  };
  Layer layer;
  Values values;
  double last_row, prior;
  scores_view<typename Layer::memory> scores;
  view<kept_tokens, 2, typename Layer::memory> counts;
  importance_scratch scratch;
  row_parts cut;  ///< of each KV head's chunks

  /// item: [sequence, part, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const part_place place = part_place::of_interleaved(item, layer.kv_heads(), cut.parts);
    if (!block.sync_and(!counts(place.sequence, place.head).undecided)) return;
    for_each_chunk(layer, place, 0, cut.parts, [&](index_t chunk, token_range tokens) {
      weigh(block, s, place.sequence, place.head, chunk, tokens);
    });
  }

 private:
  /// Attention and logits of the rows for the thread's token, summed over the KV head's q_heads.
  struct looks {
    double peak;       ///< the largest attention of any row, plus last_row times the last row's
    double attention;  ///< the sum over the rows
    double spread;     ///< the standard deviation of the logits over the rows
  };

  template <thread_block Block>
  REFREEKV_DEVICE void weigh(Block& block, shared& s, index_t sequence, index_t kv_head,
                             index_t chunk, token_range whole) const noexcept {
    const index_t head = sequence * layer.kv_heads() + kv_head;
    const token_range tokens = seen_part(window_of(layer, sequence, scratch.rows), whole);
    if (whole.begin + block.rank() < tokens.begin) {
      scores(sequence, kv_head, whole.begin + block.rank()) = 0;
    }
    const index_t token = tokens.begin + block.rank();
    const bool is_there = token < tokens.end;
    double squared_spread = 0;
    if (tokens.begin < tokens.end) {
      const looks look = look_at(block, s, sequence, kv_head, tokens);
      const double heads = static_cast<double>(layer.q_heads() / layer.kv_heads());
      const double share = weigh_rows(block, sequence, kv_head, tokens);
      if (is_there) {
        scores(sequence, kv_head, token) = static_cast<float>((look.peak / heads + prior) * share);
        const query_window window = window_of(layer, sequence, scratch.rows);
        const token_range typical = importance_rule::typical(window);
        if (token >= typical.begin && token < typical.end) {
          squared_spread = look.spread / heads * (look.spread / heads);
        }
        if (scratch.attention != nullptr) {
          scratch.attention[head * layer.capacity() + token] =
              static_cast<float>(look.attention / (heads * static_cast<double>(window.count())));
        }
      }
    }
    squared_spread = block_reduce(block, s.sums, squared_spread, plus{});
    if (block.rank() == 0) scratch.spreads[head * scratch.chunks + chunk] = squared_spread;
  }

  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE looks look_at(Block& block, shared& s, index_t sequence,
                                              index_t kv_head, token_range tokens) const noexcept {
    const index_t group = layer.q_heads() / layer.kv_heads();
    const index_t token = tokens.begin + block.rank();
    looks all{};
    REFREEKV_NO_UNROLL
    for (index_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      row_span span = rows_there(window_of(layer, sequence, scratch.rows), h, 1);
      // Relative to the first row's logit, because squares of nearly equal logits would cancel.
      float origin = 0, sum = 0, squares = 0, peak = 0, last = 0;
      tile_place at{narrow(sequence), narrow(kv_head), span, 0, tokens};
      REFREEKV_NO_UNROLL
      for (at.first = 0; at.first < span.count(); at.first += Rows) {
        multiply<any_lanes>(block, s.tile, layer, scratch.rows, at);
        block.sync();
        float attention = 0;
        const query_window window = window_of(layer, sequence, scratch.rows);
        const logit_cap cap = logit_cap::of(layer.info.attention.soft_cap);
        REFREEKV_NO_UNROLL
        for (int i = 0; i < Rows && at.first + i < span.count() && token < tokens.end; ++i) {
          const int t = block.rank();
          const float x = cap(key_reader<keys_type>::product(s.tile.keys[t], s.tile.values[i][t]) *
                              layer.info.attention.scale);
          if (at.first + i == 0) origin = x;
          sum += x - origin;
          squares += (x - origin) * (x - origin);
          const index_t row = span.row + at.first + i;
          const token_range visible = window.visible(row);
          if (token < visible.begin || token >= visible.end) continue;
          const double log_sum =
              scratch.log_sums[(sequence * layer.q_heads() + h) * scratch.rows + row];
          const float a = attention_of(x, log_sum, layer.info.attention, window, h, row, token);
          peak = larger{}(peak, a);
          if (row == scratch.rows - 1) last = a;
          attention += a;
        }
        all.attention += double{attention};
        block.sync();
      }
      const float n = 1 / static_cast<float>(span.count());
      const float variance = squares * n - sum * n * (sum * n);
      all.spread += double{std::sqrt(variance < 0 ? 0 : variance)};
      all.peak += double{peak} + last_row * double{last};
      if (!(squares < infinity)) all.peak = NAN;  // a logit is not finite, even if masked
    }
    return all;
  }

  /// Returns distance * |v| of the thread's token, where distance is 1 - the cosine of its key and
  /// its head's anchor, and 1 for a zero key.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE double weigh_rows(Block& block, index_t sequence, index_t kv_head,
                                                  token_range tokens) const noexcept {
    const index_t first = tokens.begin + warp_of(block) * warp_threads;
    const double* anchor =
        scratch.anchors + (sequence * layer.kv_heads() + kv_head) * layer.head_dim();
    const int count = count_of_warp(block, tokens);
    const double square = sum_of_row(block, layer.keys, sequence, kv_head, first, count,
                                     [](index_t, double x) { return x * x; });
    const double along = sum_of_row(block, layer.keys, sequence, kv_head, first, count,
                                    [&](index_t d, double x) { return x * anchor[d]; });
    const double value_square = sum_of_row(block, values, sequence, kv_head, first, count,
                                           [](index_t, double x) { return x * x; });
    const double distance = square <= 0 ? 1 : 1 - along / std::sqrt(square);
    return (distance < 0 ? 0 : distance) * std::sqrt(value_square);
  }

  using keys_type = std::remove_cvref_t<decltype(std::declval<Layer>().keys)>;
};

/// Multiplies the scores by their head's factor sigma. Writes to `bad` which chunks have a score
/// that is not finite.
template <class Layer>
struct spread_scores_body {
  using shared = warp_values<double>;
  Layer layer;
  scores_view<typename Layer::memory> scores;
  view<kept_tokens, 2, typename Layer::memory> counts;
  importance_scratch scratch;
  row_parts cut;  ///< of each KV head's chunks

  /// item: [sequence, part, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const part_place place = part_place::of_interleaved(item, layer.kv_heads(), cut.parts);
    if (!block.sync_and(!counts(place.sequence, place.head).undecided)) return;
    const query_window window = window_of(layer, place.sequence, scratch.rows);
    if (window.tokens == 0) return;
    double spread = 0;
    for (index_t c = block.rank(); c < chunking{window.tokens, 0}.count(); c += block_threads) {
      spread += scratch.spreads[place.row * scratch.chunks + c];
    }
    spread = block_reduce(block, s, spread, plus{});
    const token_range typical = importance_rule::typical(window);
    // A single row has no spread, so all heads get the same factor.
    const double sigma = window.count() > 1
                             ? std::sqrt(spread / static_cast<double>(typical.end - typical.begin))
                             : 1;
    for_each_chunk(layer, place, 0, cut.parts, [&](index_t chunk, token_range tokens) {
      const index_t token = seen_part(window, tokens).begin + block.rank();
      bool finite = true;
      if (token < tokens.end) {
        float& score = scores(place.sequence, place.head, token);
        score = static_cast<float>(double{score} * sigma);
        finite = std::fabs(score) < infinity;
      }
      finite = block.sync_and(finite);
      if (block.rank() == 0) scratch.bad[place.row * scratch.chunks + chunk] = finite ? 0 : 1;
    });
  }
};

/// Sets `undecided` of the KV heads with a chunk marked in `bad`.
template <class Layer>
struct join_bad_body {
  struct shared {};
  Layer layer;
  view<kept_tokens, 2, typename Layer::memory> counts;
  importance_scratch scratch;

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const auto [sequence, kv_head] = head_place::of(item, layer.kv_heads());
    const index_t tokens = layer.tokens(sequence);
    bool& undecided = counts(sequence, kv_head).undecided;
    if (tokens == 0 || !block.sync_and(!undecided)) return;
    bool good = true;
    for (index_t c = block.rank(); c < chunking{tokens, 0}.count(); c += block_threads) {
      good = good && scratch.bad[item * scratch.chunks + c] == 0;
    }
    good = block.sync_and(good);
    if (block.rank() == 0) undecided = !good;
  }
};

/// The primitive `weigh_tokens`: see `ops`.
template <class Backend, class Valued>
[[nodiscard]] status weigh_tokens(const Backend& exec, const importance_rule& rule,
                                  const Valued& valued,
                                  const scores_view<typename Valued::memory>& scores,
                                  const view<kept_tokens, 2, typename Valued::memory>& counts,
                                  const importance_scratch& scratch) noexcept {
  const auto& layer = detail::plain(valued);
  using layer_type = std::remove_cvref_t<decltype(layer)>;
  using values_type = std::remove_cvref_t<decltype(valued.values)>;
  const index_t rows = scratch.rows;
  arena normalising_memory = scratch.carve(), directions_memory = scratch.carve();
  const attention_scratch normalising =
      importance_scratch::carve_normalising(normalising_memory, rule, layer);
  double* directions = scratch.carve_directions(directions_memory, layer);
  const row_parts cut = row_parts::of_chunks(kv_head_items(layer), scratch.chunks);

  status s = normalise_rows(exec, rows, bad_rows::stay, layer, normalising);
  if (s != status::ok) return s;
  const check_rows_body<layer_type> check{layer, rows, normalising.normalisers, scratch.log_sums,
                                          counts};
  s = run_blocks(exec, kv_head_items(layer), check);
  if (s != status::ok) return s;
  const directions_body<layer_type> sums{layer, rows, scratch.chunks, counts, directions, cut};
  s = run_blocks(exec, cut.items(), sums);
  if (s != status::ok) return s;
  const anchor_body<layer_type> anchor{layer, scratch.chunks, counts, directions, scratch.anchors};
  s = run_blocks(exec, kv_head_items(layer), anchor);
  if (s != status::ok) return s;
  s = with_tile<few_rows<layer_type>>(rows, [&](auto tile) {
    const weigh_body<layer_type, values_type, tile()> weigh{
        scaled(layer), valued.values, rule.last_row, rule.prior, scores, counts, scratch, cut};
    return run_blocks(exec, cut.items(), weigh);
  });
  if (s != status::ok) return s;
  const spread_scores_body<layer_type> spread{layer, scores, counts, scratch, cut};
  s = run_blocks(exec, cut.items(), spread);
  if (s != status::ok) return s;
  const join_bad_body<layer_type> join{layer, counts, scratch};
  s = run_blocks(exec, kv_head_items(layer), join);
  if (s != status::ok || !rule.stand_ins) return s;
  return fit_maps(exec, rule, layer, scratch);
}

}  // namespace refreekv::inline v0::cuda_detail
