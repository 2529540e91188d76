// SPDX-License-Identifier: Apache-2.0
// The mean direction of each KV head's keys, on a device.
#pragma once

#include "refreekv/cuda/faithful/bare_logits.hpp"
#include "refreekv/cuda/faithful/importance_scratch.hpp"

namespace refreekv::inline v0::cuda_detail {

/// How many of a chunk's tokens the thread's warp handles, one token per lane.
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE int count_of_warp(const Block& block, token_range tokens) noexcept {
  const index_t left = tokens.end - tokens.begin - warp_of(block) * warp_threads;
  return left < 0 ? 0 : left < warp_threads ? narrow(left) : warp_threads;
}

/// The part of a chunk that starts at the first token any row of the window sees.
[[nodiscard]] REFREEKV_DEVICE token_range seen_part(const query_window& window,
                                                    token_range chunk) noexcept {
  const index_t begin = importance_rule::seen_by(window).begin;
  return {begin > chunk.begin ? begin < chunk.end ? begin : chunk.end : chunk.begin, chunk.end};
}

/// Writes directions [sequence, kv_head, chunk, head_dim]: the sum of k / |k| over the chunk's
/// seen_part. Skips undecided heads.
template <class Layer>
struct directions_body {
  struct shared {
    double sums[block_warps][warp_threads];
  };
  Layer layer;
  index_t rows;
  index_t chunks;
  view<kept_tokens, 2, typename Layer::memory> counts;
  double* directions;
  row_parts cut;  ///< of each KV head's chunks

  /// item: [sequence, part, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const part_place place = part_place::of_interleaved(item, layer.kv_heads(), cut.parts);
    if (!block.sync_and(!counts(place.sequence, place.head).undecided)) return;
    for_each_chunk(layer, place, 0, cut.parts, [&](index_t chunk, token_range tokens) {
      sum(block, s, place.sequence, place.head,
          seen_part(window_of(layer, place.sequence, rows), tokens),
          directions + (place.row * chunks + chunk) * layer.head_dim());
    });
  }

 private:
  template <thread_block Block>
  REFREEKV_DEVICE void sum(Block& block, shared& s, index_t sequence, index_t kv_head,
                           token_range tokens, double* to) const noexcept {
    const index_t dims = layer.head_dim(), first = tokens.begin + warp_of(block) * warp_threads;
    const int lane = lane_of(block);
    const int count = count_of_warp(block, tokens);
    const double square = sum_of_row(block, layer.keys, sequence, kv_head, first, count,
                                     [](index_t, double x) { return x * x; });
    // 1 / |k| of this thread's key; 0 for a zero key, which has no direction.
    const double inverse = lane >= count || square <= 0 ? 0 : 1 / std::sqrt(square);
    for (index_t strip = 0; strip < dims; strip += warp_threads) {
      double sum = 0;
      const index_t dim = strip + lane < dims ? strip + lane : dims - 1;
      for_each_element(
          layer.keys, sequence, kv_head, dim, 0, count, 1, [&](int i) { return first + i; },
          [&](int i, float x) { sum += double{x} * block.warp_broadcast(inverse, i); });
      s.sums[warp_of(block)][lane] = sum;
      block.sync();
      if (block.rank() < warp_threads && strip + lane < dims) {
        double all = 0;
        for (int w = 0; w < block_warps; ++w) all += s.sums[w][lane];
        to[strip + lane] = all;
      }
      block.sync();
    }
  }
};

/// Writes anchors [sequence, kv_head, head_dim]: the sum of a head's directions, scaled to length
/// 1, or 0 if the sum has no direction (detail::has_direction). Skips undecided heads.
template <class Layer>
struct anchor_body {
  using shared = warp_values<double>;
  Layer layer;
  index_t chunks;
  view<kept_tokens, 2, typename Layer::memory> counts;
  const double* directions;
  double* anchors;

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const auto [sequence, kv_head] = head_place::of(item, layer.kv_heads());
    const index_t dims = layer.head_dim(), tokens = layer.tokens(sequence);
    const index_t count = chunking{tokens, 0}.count();
    if (!block.sync_and(!counts(sequence, kv_head).undecided)) return;
    double* to = anchors + item * dims;
    double square = 0;
    for (index_t d = block.rank(); d < dims; d += block_threads) {
      double sum = 0;
      for (index_t c = 0; tokens > 0 && c < count; ++c) {
        sum += directions[(item * chunks + c) * dims + d];
      }
      to[d] = sum;
      square += sum * sum;
    }
    const double length = std::sqrt(block_reduce(block, s, square, plus{}));
    const double factor = detail::has_direction(length, tokens) ? 1 / length : 0;
    for (index_t d = block.rank(); d < dims; d += block_threads) to[d] *= factor;
  }
};

}  // namespace refreekv::inline v0::cuda_detail
