// SPDX-License-Identifier: Apache-2.0
// Token scores on a device: attention summed over rows, and pooling.
#pragma once

#include "refreekv/backend/token_scores.hpp"
#include "refreekv/core/workspace.hpp"
#include "refreekv/cuda/window_attention.hpp"
#include "refreekv/decision/kept_positions.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Rows, over all query heads of a KV head, whose statistics are stored at once.
inline constexpr index_t rows_together = 128;

/// Scratch of the attention primitives. For each query head of each sequence it has 16 bytes for
/// each row (normalisers). For one block of rows it has 12 bytes for each row and chunk
/// (statistics).
struct attention_scratch {
  index_t window;                ///< rows of the longest sequence
  index_t rows;                  ///< rows of each query head in one block of rows
  index_t chunks;                ///< chunks of the longest sequence
  chunk_statistics* statistics;  ///< [sequence, q_head, rows, chunk]
  row_normaliser* normalisers;   ///< [sequence, q_head, window]
  double* totals;                ///< [sequence, kv_head, chunk, 2]: entropy and variance

  template <class Layer>
  static attention_scratch carve(arena& from, index_t window, const Layer& layer) noexcept {
    const index_t group = layer.q_heads() / layer.kv_heads();
    const index_t most = group < rows_together ? rows_together / group : 1;
    attention_scratch s{};
    // Only rows with `ends` may outnumber the tokens.
    const bool is_capped = layer.info.rows.ends.data() == nullptr && window > layer.capacity();
    s.window = is_capped ? layer.capacity() : window;
    s.rows = s.window < most ? s.window : most;
    s.chunks = chunking{layer.capacity(), 0}.count();
    s.statistics =
        from.array<chunk_statistics>(layer.sequences(), layer.q_heads(), s.rows, s.chunks);
    s.normalisers = from.array<row_normaliser>(layer.sequences(), layer.q_heads(), s.window);
    s.totals = from.array<double>(layer.sequences(), layer.kv_heads(), s.chunks, 2);
    return s;
  }
};

/// Excludes rows without a softmax. A row of which any query head has none gets the normaliser 0 in
/// all query heads of the KV head, which becomes undecided. With row_is_needed a KV head without a
/// row becomes undecided, too.
template <class Layer>
struct leave_out_body {
  struct shared {};
  Layer layer;
  index_t window;
  bool row_is_needed;
  row_normaliser* normalisers;  ///< [sequence, q_head, window]
  view<kept_tokens, 2, typename Layer::memory> counts;

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const auto [sequence, kv_head] = head_place::of(item, layer.kv_heads());
    const index_t group = layer.q_heads() / layer.kv_heads();
    const query_window rows = window_of(layer, sequence, window);
    row_normaliser* of = normalisers + item * group * window;
    bool all = true;
    for (index_t r = rows.first_row() + block.rank(); r < window; r += block_threads) {
      bool exists = true;
      for (index_t h = 0; h < group; ++h) exists = exists && of[h * window + r].exists();
      for (index_t h = 0; h < group && !exists; ++h) of[h * window + r].sum = 0;
      all = all && exists;
    }
    all = block.sync_and(all);
    if (block.rank() != 0) return;
    counts(sequence, kv_head).undecided = !all || (row_is_needed && rows.is_blind());
  }
};

/// Writes the normalisers of the last `window` rows. Reads the keys once for each block of rows.
/// O(q_heads * window * tokens * head_dim)
template <class Backend, class Layer>
[[nodiscard]] status normalise_rows(const Backend& exec, index_t window, bad_rows bad,
                                    const Layer& layer, const attention_scratch& scratch) noexcept {
  status s = status::ok;
  for (index_t row = 0; row < window && s == status::ok; row += scratch.rows) {
    const index_t rows = window - row < scratch.rows ? window - row : scratch.rows;
    s = read_chunks(exec, layer, window, row, rows, 0, scratch.chunks, scratch.statistics);
    if (s != status::ok) break;
    const normalise_body<Layer> body{layer,
                                     window,
                                     row,
                                     rows,
                                     0,
                                     scratch.chunks,
                                     bad == bad_rows::left_out,
                                     scratch.statistics,
                                     scratch.normalisers};
    s = run_blocks(exec, body.items(), body);
  }
  return s;
}

/// Reads a chunk again and calls f(attention) in each thread, for the thread's token and each row
/// that sees it. The rows are a span of the last `rows` rows, without those that are left out. The
/// block is synchronised between tiles. normalisers: [q_head of the span, window]
template <int Rows, thread_block Block, class Layer, class F>
REFREEKV_DEVICE void for_each_attention(Block& block, tile<Layer, Rows>& s, const Layer& layer,
                                        index_t rows, tile_place at, bad_rows bad,
                                        const row_normaliser* normalisers, const F& f) noexcept {
  constexpr float is_left_out = -1;
  for (at.first = 0; at.first < at.span.count(); at.first += Rows) {
    const int last = at.first + Rows < at.span.count() ? at.first + Rows : at.span.count();
    const int head = at.span.q_head_of(at.first);
    if (head == at.span.q_head_of(last - 1)) {
      const int row = at.span.row_of(at.first);
      const row_span span{head, 1, row, last - at.first};
      if (sees_nothing(window_of(layer, at.sequence, rows), span, at.tokens)) continue;
    }
    attend<leaves::values, any_lanes>(block, s, layer, rows, at);
    // Computed only now: while keys are read there is no register for it.
    const query_window window = window_of(layer, at.sequence, rows);
    set_weights(block, s, [&](int i) {
      const int of = at.first + i;
      const index_t row = at.span.row_of(of);
      if (of >= last || row < window.first_row()) return 0.0f;
      const index_t q_head = at.span.q_head_of(of) - at.span.q_head;
      const row_normaliser& normaliser = normalisers[q_head * rows + row];
      if (bad == bad_rows::left_out && !normaliser.exists()) return is_left_out;
      return static_cast<float>(detail::weight_of(s.statistics[i].exponent, normaliser));
    });
    const index_t token = at.tokens.begin + block.rank();
    REFREEKV_NO_UNROLL
    for (int i = 0; at.first + i < last && token < at.tokens.end; ++i) {
      // Tests visibility, not the value: a row of NaN gives 0, not NaN, to tokens it does not see.
      const index_t row = at.span.row_of(at.first + i);
      if (row < window.first_row() || s.weights[i] < 0) continue;
      const token_range visible = window.visible(row);
      if (token >= visible.begin && token < visible.end) {
        f(s.values[i][block.rank()] * s.weights[i]);
      }
    }
    block.sync();
  }
}

/// Writes the scores of the tokens: attention summed over rows. One thread per token.
template <class Layer, int Rows>
struct attention_sums_body {
  struct shared {
    cuda_detail::tile<Layer, Rows> tile;
  };
  Layer layer;
  index_t window;
  bool carried;
  scores_view<typename Layer::memory> scores;  ///< [sequence, head, token]
  view<kept_tokens, 2, typename Layer::memory> counts;
  row_parts cut;  ///< of the chunks of a head
  const row_normaliser* normalisers;

  /// item: [sequence, part, head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const part_place place = part_place::of_interleaved(item, scores.extent(1), cut.parts);
    for_each_chunk(layer, place, 0, cut.parts, [&](index_t chunk, token_range tokens) {
      if (!carried && chunk == 0 && block.rank() == 0) tell_blindness(place.sequence, place.head);
      if (tokens.begin < tokens.end) sum(block, s, place.sequence, place.head, tokens);
    });
  }

 private:
  /// Writes whether a KV head has no row; done once per KV head, by its first score head.
  REFREEKV_DEVICE void tell_blindness(index_t sequence, index_t head) const noexcept {
    const index_t heads = scores.extent(1) / layer.kv_heads();
    if (head % heads != 0) return;
    counts(sequence, head / heads).undecided = window_of(layer, sequence, window).is_blind();
  }

  template <thread_block Block>
  REFREEKV_DEVICE void sum(Block& block, shared& s, index_t sequence, index_t head,
                           token_range tokens) const noexcept {
    const index_t q_heads = layer.q_heads() / scores.extent(1);  // averaged in one score
    const tile_place at{narrow(sequence),
                        narrow(head * q_heads / (layer.q_heads() / layer.kv_heads())),
                        {narrow(head * q_heads), narrow(q_heads), 0, narrow(window)},
                        0,
                        tokens};
    double sum = 0;
    for_each_attention(block, s.tile, layer, window, at,
                       carried ? bad_rows::left_out : bad_rows::stay,
                       normalisers + (sequence * layer.q_heads() + head * q_heads) * window,
                       [&](float attention) { sum += double{attention}; });
    if (block.rank() >= at.size()) return;
    const index_t token = at.tokens.begin + block.rank();
    const bool fresh = token >= window_of(layer, sequence, window).first_new_token();
    float& score = scores(sequence, head, token);
    const auto mean = static_cast<float>(sum / static_cast<double>(q_heads));
    score = carried && !fresh ? score + mean : mean;
  }
};

template <class Backend, class Layer>
[[nodiscard]] status attention_sums(const Backend& exec, const score_rows& rows, const Layer& layer,
                                    const scores_view<typename Layer::memory>& scores,
                                    const view<kept_tokens, 2, typename Layer::memory>& counts,
                                    const attention_scratch& scratch) noexcept {
  const index_t window = rows.rows < scratch.window ? rows.rows : scratch.window;
  const bad_rows bad = rows.carried ? bad_rows::left_out : bad_rows::stay;
  status s = normalise_rows(exec, window, bad, layer, scratch);
  if (s == status::ok && rows.carried) {
    const leave_out_body<Layer> body{layer, window, false, scratch.normalisers, counts};
    s = run_blocks(exec, kv_head_items(layer), body);
  }
  if (s != status::ok) return s;
  const row_parts cut = row_parts::of_chunks(layer.sequences() * scores.extent(1), scratch.chunks);
  return with_tile<few_rows<Layer>>(layer.q_heads() / scores.extent(1) * window, [&](auto tile) {
    const attention_sums_body<Layer, tile()> body{scaled(layer), window, rows.carried,       scores,
                                                  counts,        cut,    scratch.normalisers};
    return run_blocks(exec, cut.items(), body);
  });
}

/// Pools scores. One thread per token.
template <class Layer>
struct pool_body {
  struct shared {};
  pooling mode;
  const token_quota* quotas;
  Layer layer;
  scores_view<typename Layer::memory> scores, pooled;
  row_parts cut;

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t row = item / cut.parts, part = item % cut.parts;
    const index_t s = row / layer.kv_heads(), h = row % layer.kv_heads();
    const index_t count = layer.tokens(s) - quotas[s].recent;
    for (index_t t = part * block_threads + block.rank(); t < count;
         t += cut.parts * block_threads) {
      pooled(s, h, t) = detail::pooled_score(mode, count, scores.at(s, h), scores.stride(2), t);
    }
  }
};

template <class Backend, class Layer>
[[nodiscard]] status pool(const Backend& exec, const pooling& mode, const token_quota* quotas,
                          const Layer& layer, const scores_view<typename Layer::memory>& scores,
                          const scores_view<typename Layer::memory>& pooled) noexcept {
  const row_parts cut = row_parts::of(kv_head_items(layer), blocks_for(layer.capacity()));
  return run_blocks(exec, cut.items(), pool_body<Layer>{mode, quotas, layer, scores, pooled, cut});
}

}  // namespace refreekv::inline v0::cuda_detail
