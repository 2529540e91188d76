// SPDX-License-Identifier: Apache-2.0
// The contribution of tokens to the attention outputs of the measured rows, on a device.
#pragma once

#include "refreekv/cuda/faithful/stand_ins.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The measured rows of a KV head. Requires that at least one row exists.
[[nodiscard]] REFREEKV_DEVICE stepped_span measured_rows(const importance_rule& rule,
                                                         const query_window& window,
                                                         index_t kv_head, index_t group) noexcept {
  const index_t count = window.count();
  return {narrow(kv_head * group), narrow(group),
          narrow(window.first_row() + (count - 1) % rule.error_rows), narrow(rule.measured(count)),
          narrow(rule.error_rows)};
}

/// The tokens that a size drops or, with `all`, the tokens that any row sees.
template <class Layer>
struct dropped_tokens {
  static constexpr bool masked = true;
  static constexpr double sign = 1;
  graded_sizes<typename Layer::memory> graded;
  bool all;

  [[nodiscard]] REFREEKV_DEVICE bool is_open(index_t sequence) const noexcept {
    return graded.is_open(sequence);
  }
  [[nodiscard]] REFREEKV_DEVICE index_t count(const Layer& layer, index_t sequence,
                                              index_t /*kv_head*/) const noexcept {
    return layer.tokens(sequence);
  }
  [[nodiscard]] REFREEKV_DEVICE bool holds(index_t sequence, index_t kv_head,
                                           index_t token) const noexcept {
    return graded.drops(sequence, kv_head, token, all ? -1 : int{graded.sizes[sequence]});
  }
};

/// The stand-ins. They have a negative sign, because they reduce what a size loses. They have no
/// position, and every row sees them.
template <class Layer>
struct standing_rows {
  static constexpr bool masked = false;
  static constexpr double sign = -1;
  const size_range* ranges;
  view<position_t, 2, typename Layer::memory> counts;

  [[nodiscard]] REFREEKV_DEVICE bool is_open(index_t sequence) const noexcept {
    return ranges[sequence].is_open();
  }
  [[nodiscard]] REFREEKV_DEVICE index_t count(const Layer&, index_t sequence,
                                              index_t kv_head) const noexcept {
    return counts(sequence, kv_head);
  }
  [[nodiscard]] REFREEKV_DEVICE bool holds(index_t, index_t, index_t) const noexcept {
    return true;
  }
};

/// Writes outputs [sequence, kv_head, split, measured row, dim of values + 1]: the sums of
/// attention * value over the given tokens, then the sum of their attention. Attention is
/// normalised by the softmax over the whole cache. Tokens overwrite outputs; stand-ins are
/// subtracted from them. Sums are double across chunks, float over a warp's tokens in a chunk.
template <class Layer, class Keys, class Values, class Tokens, int Rows>
struct outputs_body {
  using rows_type =
      query_layer<std::remove_cvref_t<decltype(*std::declval<Layer>().queries.data())>, Keys>;
  struct shared {
    cuda_detail::tile<rows_type, Rows> tile;
    position_t list[block_threads];
    float sums[block_warps][std::size_t{Rows}][warp_threads];
    warp_values<int> counts;
  };

  importance_rule rule;
  Layer layer;
  Keys keys;
  Values values;
  Tokens tokens;
  const double* log_sums;  ///< [sequence, q_head, rows]
  output_splits splits;
  index_t measured;  ///< measured rows per query head
  double* outputs;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t group() const noexcept {
    return layer.q_heads() / layer.kv_heads();
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tiles() const noexcept {
    return row_tiles<Rows>(group() * measured);
  }
  [[nodiscard]] constexpr index_t items() const noexcept {
    return layer.sequences() * splits.count * layer.kv_heads() * tiles();
  }

  /// item: [sequence, split, kv_head, tile]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t tile = item % tiles(), kv_head = item / tiles() % layer.kv_heads();
    const index_t split = item / tiles() / layer.kv_heads() % splits.count;
    const index_t sequence = item / tiles() / layer.kv_heads() / splits.count;
    if (!tokens.is_open(sequence) || split >= splits.used(layer.tokens(sequence))) return;
    const stepped_span span =
        measured_rows(rule, window_of(layer, sequence, rule.rows), kv_head, group());
    listed_place<stepped_span> at{
        narrow(sequence), narrow(kv_head), span, narrow(tile * Rows), 0, s.list};
    if (at.first >= span.count()) return;
    const index_t width = values.shape().head_dim + 1;
    double* const to = outputs + (((sequence * layer.kv_heads() + kv_head) * splits.count + split) *
                                      group() * measured +
                                  at.first) *
                                     width;
    if constexpr (Tokens::masked) clear(block, at, to);
    const index_t all = tokens.count(layer, sequence, kv_head), begin = split * splits.tokens;
    const index_t end = all < begin + splits.tokens ? all : begin + splits.tokens;
    REFREEKV_NO_UNROLL
    for (index_t first = begin; first < end; first += chunk_tokens) {
      at.count = list(block, s, at, first, end);
      if (at.count == 0) continue;
      look(block, s, at);
      add(block, s, at, to);
    }
  }

 private:
  /// Zeroes a tile's outputs. The thread that adds to an element also zeroes it: no sync needed.
  template <thread_block Block, class Place>
  REFREEKV_DEVICE void clear(const Block& block, const Place& at, double* to) const noexcept {
    const index_t dims = values.shape().head_dim;
    const int i = warp_of(block);
    if (i >= Rows || at.first + i >= at.span.count()) return;
    for (index_t d = lane_of(block); d < dims; d += warp_threads) to[i * (dims + 1) + d] = 0;
    if (lane_of(block) == 0) to[i * (dims + 1) + dims] = 0;
  }

  /// Lists a chunk's tokens that `tokens` holds, in order. Returns how many.
  template <thread_block Block, class Place>
  [[nodiscard]] REFREEKV_DEVICE int list(Block& block, shared& s, const Place& at, index_t first,
                                         index_t end) const noexcept {
    const index_t token = first + block.rank();
    const bool held = token < end && tokens.holds(at.sequence, at.kv_head, token);
    const auto sums = block_prefix_sum(block, s.counts, held ? 1 : 0);
    if (held) s.list[sums.own - 1] = static_cast<position_t>(token);
    block.sync();
    return sums.all;
  }

  /// Fills the tile with the attention of its rows to the listed tokens.
  template <thread_block Block, class Place>
  REFREEKV_DEVICE void look(Block& block, shared& s, const Place& at) const noexcept {
    multiply<any_lanes>(block, s.tile, rows_type{{keys, layer.info}, layer.queries}, rule.rows, at);
    block.sync();
    const auto& params = layer.info.attention;
    const logit_cap cap = logit_cap::of(params.soft_cap);
    const query_window window = window_of(layer, at.sequence, rule.rows);
    const int t = block.rank();
    REFREEKV_NO_UNROLL
    for (int i = 0; i < Rows && t < at.count; ++i) {
      float& value = s.tile.values[i][t];
      const int of = at.first + i;
      if (of >= at.span.count()) {
        value = 0;
        continue;
      }
      const index_t row = at.span.row_of(of), q_head = at.span.q_head_of(of);
      const float x = cap(key_reader<Keys>::product(s.tile.keys[t], value) * params.scale);
      const double log_sum = log_sums[(at.sequence * layer.q_heads() + q_head) * rule.rows + row];
      if constexpr (Tokens::masked) {
        const token_range visible = window.visible(row);
        const index_t token = at.token(t);
        value = token < visible.begin || token >= visible.end
                    ? 0
                    : attention_of(x, log_sum, params, window, q_head, row, token);
      } else {
        value = std::exp(static_cast<float>(double{x} - log_sum));
      }
    }
    block.sync();
  }

  /// Adds the tile's attention * values, and its attention, to outputs.
  template <thread_block Block, class Place>
  REFREEKV_DEVICE void add(Block& block, shared& s, const Place& at, double* to) const noexcept {
    const index_t dims = values.shape().head_dim;
    const int own = warp_of(block), lane = lane_of(block);
    const bool is_there = own < Rows && at.first + own < at.span.count();
    if (own < Rows) {
      double sum = 0;
      for (int t = lane; t < at.count; t += warp_threads) sum += double{s.tile.values[own][t]};
      sum = block.warp_reduce(sum, plus{});
      if (is_there && lane == 0) to[own * (dims + 1) + dims] += Tokens::sign * sum;
    }
    for (index_t d = lane; d - lane < dims; d += warp_threads) {
      float sums[std::size_t{Rows}] = {};
      for_each_element(
          values, at.sequence, at.kv_head, d < dims ? d : dims - 1, own, at.count, block_warps,
          [&](int t) { return at.token(t); },
          [&](int t, float x) {
            REFREEKV_UNROLL
            for (int i = 0; i < Rows; ++i) sums[i] += s.tile.values[i][t] * x;
          });
      REFREEKV_UNROLL
      for (int i = 0; i < Rows; ++i) s.sums[own][i][lane] = sums[i];
      block.sync();
      if (is_there && d < dims) {
        double sum = 0;
        for (int w = 0; w < block_warps; ++w) sum += double{s.sums[w][own][lane]};
        to[own * (dims + 1) + d] += Tokens::sign * sum;
      }
      block.sync();
    }
  }
};

}  // namespace refreekv::inline v0::cuda_detail
