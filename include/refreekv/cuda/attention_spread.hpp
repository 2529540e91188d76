// SPDX-License-Identifier: Apache-2.0
// The scores of CAKE (arXiv 2503.12491, section 4) on a device: mean and variance of attention, and
// its entropy.
#pragma once

#include "refreekv/cuda/token_scores.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Writes scores: mean attention plus `gain` times its variance. One thread per token. Also writes
/// each chunk's entropy and variance, summed over its tokens, to scratch.totals.
template <class Layer, int Rows>
struct attention_spread_body {
  struct shared {
    cuda_detail::tile<Layer, Rows> tile;
    warp_values<double> sums;
  };
  static constexpr int resident_blocks = row_registers<Layer> > 8 ? 1 : 2;  // no spill

  Layer layer;
  index_t window;
  index_t recent;
  double gain;
  scores_view<typename Layer::memory> scores;  ///< [sequence, kv_head, token]
  row_parts cut;                               ///< of the chunks of a KV head
  attention_scratch scratch;

  /// item: [sequence, part, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const part_place place = part_place::of_interleaved(item, layer.kv_heads(), cut.parts);
    for_each_chunk(layer, place, 0, cut.parts, [&](index_t chunk, token_range tokens) {
      spread(block, s, place.sequence, place.head, chunk, tokens);
    });
  }

 private:
  template <thread_block Block>
  REFREEKV_DEVICE void spread(Block& block, shared& s, index_t sequence, index_t kv_head,
                              index_t chunk, token_range range) const noexcept {
    const index_t kv_heads = layer.kv_heads();
    const query_window rows = window_of(layer, sequence, window);
    const index_t before_recent = rows.tokens > recent ? rows.tokens - recent : 0;
    const index_t scored = range.end < before_recent ? range.end : before_recent;
    double entropy = 0, variance = 0;
    if (range.begin < scored) {
      const index_t token = range.begin + block.rank();
      const index_t group = layer.q_heads() / kv_heads;
      const index_t first_head = sequence * layer.q_heads() + kv_head * group;
      double n = 0;
      for (index_t r = rows.first_row(); r < window; ++r) {
        n += scratch.normalisers[first_head * window + r].exists() ? 1 : 0;
      }
      n = n > 1 ? n : 1;
      double score = 0;
      for (index_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
        const tile_place at{
            narrow(sequence), narrow(kv_head), {narrow(h), 1, 0, narrow(window)}, 0, range};
        double sum = 0, squares = 0;
        for_each_attention(block, s.tile, layer, window, at, bad_rows::left_out,
                           scratch.normalisers + (sequence * layer.q_heads() + h) * window,
                           [&](float attention) {
                             if (token >= scored) return;
                             const double a = attention;
                             sum += a;
                             squares += a * a;
                             entropy -= double{attention * std::log(attention + 1e-10f)};
                           });
        double spread = n < 2 ? 0 : (squares - sum / n * sum) / (n - 1);
        if (spread < 0) spread = 0;
        variance += spread;
        score += sum / n + gain * spread;
      }
      if (token < scored) {
        scores(sequence, kv_head, token) = static_cast<float>(score / static_cast<double>(group));
      } else {
        variance = 0;
      }
    }
    entropy = block_reduce(block, s.sums, entropy, plus{});
    variance = block_reduce(block, s.sums, variance, plus{});
    if (block.rank() == 0) {
      double* own = scratch.totals + 2 * ((sequence * kv_heads + kv_head) * scratch.chunks + chunk);
      own[0] = entropy;
      own[1] = variance;
    }
  }
};

/// Sums totals [sequence, kv_head, chunk, 2] to [sequence, 2]. One thread per KV head.
template <class Layer>
struct totals_body {
  struct shared {
    warp_values<double> sums;
  };
  Layer layer;
  index_t chunks;  ///< chunks of the longest sequence
  const double* parts;
  double* totals;

  /// item: sequence
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t count = chunking{layer.tokens(item), 0}.count();
    double entropy = 0, variance = 0;
    for (index_t h = block.rank(); h < layer.kv_heads(); h += block_threads) {
      double of_head = 0;
      for (index_t c = 0; c < count; ++c) {
        const double* part = parts + 2 * ((item * layer.kv_heads() + h) * chunks + c);
        of_head += part[0];
        variance += part[1];
      }
      entropy += of_head < 0 ? 0 : of_head;  // negative, for example, where ready rows exceed 1
    }
    entropy = block_reduce(block, s.sums, entropy, plus{});
    variance = block_reduce(block, s.sums, variance, plus{});
    if (block.rank() == 0) {
      totals[2 * item] = entropy;
      totals[2 * item + 1] = variance;
    }
  }
};

template <class Backend, class Layer>
[[nodiscard]] status attention_spread(const Backend& exec, index_t rows, index_t recent,
                                      double gain, const Layer& layer,
                                      const scores_view<typename Layer::memory>& scores,
                                      const view<kept_tokens, 2, typename Layer::memory>& counts,
                                      double* totals, const attention_scratch& scratch) noexcept {
  const index_t window = rows < scratch.window ? rows : scratch.window;
  status s = normalise_rows(exec, window, bad_rows::left_out, layer, scratch);
  if (s == status::ok) {
    const leave_out_body<Layer> body{layer, window, true, scratch.normalisers, counts};
    s = run_blocks(exec, kv_head_items(layer), body);
  }
  if (s != status::ok) return s;
  const row_parts cut = row_parts::of_chunks(kv_head_items(layer), scratch.chunks);
  s = with_tile<few_rows<Layer>>(window, [&](auto tile) {
    const attention_spread_body<Layer, tile()> body{scaled(layer), window, recent, gain,
                                                    scores,        cut,    scratch};
    return run_blocks(exec, cut.items(), body);
  });
  if (s != status::ok) return s;
  const totals_body<Layer> body{layer, scratch.chunks, scratch.totals, totals};
  return run_blocks(exec, layer.sequences(), body);
}

}  // namespace refreekv::inline v0::cuda_detail
