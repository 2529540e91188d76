// SPDX-License-Identifier: Apache-2.0
// Assigns stand-ins to the blocks of positions whose dropped tokens they replace, on a device.
#pragma once

#include "refreekv/cuda/faithful/importance_scratch.hpp"
#include "refreekv/decision/stand_ins.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The grades of the tokens, and the size of each sequence.
template <class Memory>
struct graded_sizes {
  view<const grade, 3, Memory> grades;
  const position_t* sizes;   ///< [sequence]
  const size_range* ranges;  ///< [sequence]: only open ones are processed; null: all are

  [[nodiscard]] REFREEKV_DEVICE bool is_open(index_t sequence) const noexcept {
    return ranges == nullptr || ranges[sequence].is_open();
  }
  [[nodiscard]] REFREEKV_DEVICE bool drops(index_t sequence, index_t kv_head, index_t token,
                                           int size) const noexcept {
    const grade g = grades(sequence, kv_head, token);
    return int{g} > size && g != grade_never;
  }
};

/// How many tokens of a block of positions a size drops. O(tokens of the block).
template <class Layer>
struct dropped_of_blocks {
  graded_sizes<typename Layer::memory> graded;
  index_t sequence, kv_head, tokens, block_tokens;
  int size;

  [[nodiscard]] REFREEKV_DEVICE index_t count() const noexcept {
    return (tokens + block_tokens - 1) / block_tokens;
  }
  [[nodiscard]] REFREEKV_DEVICE index_t operator()(index_t b) const noexcept {
    const index_t next = (b + 1) * block_tokens, end = tokens < next ? tokens : next;
    index_t dropped = 0;
    for (index_t t = b * block_tokens; t < end; ++t) {
      dropped += graded.drops(sequence, kv_head, t, size) ? 1 : 0;
    }
    return dropped;
  }
};

/// Assigns one stand-in to each block of positions that drops a token. Assigns none if the KV head
/// drops fewer than 2 tokens. Writes slots [sequence, kv_head, block + 1]: the index of each
/// block's first stand-in.
template <class Layer>
struct slots_body {
  using memory = typename Layer::memory;
  using shared = warp_values<std::uint64_t>;
  Layer layer;
  index_t block_tokens;
  graded_sizes<memory> graded;
  index_t blocks;  ///< blocks of positions of the longest sequence
  position_t* slots;
  position_t* standing;  ///< [sequence, kv_head]
  view<position_t, 2, memory> counts;

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const auto [sequence, kv_head] = head_place::of(item, layer.kv_heads());
    if (!graded.is_open(sequence)) return;
    const dropped_of_blocks<Layer> of{
        graded, sequence, kv_head, layer.tokens(sequence), block_tokens, graded.sizes[sequence]};
    position_t* const own = slots + item * (blocks + 1);
    std::uint64_t before = 0, dropped = 0;
    for (index_t first = 0; first < of.count(); first += block_threads) {
      const index_t b = first + block.rank();
      const index_t lost = b < of.count() ? of(b) : 0;
      const auto sums = block_prefix_sum(block, s, std::uint64_t{lost > 0});
      if (b < of.count()) own[b + 1] = static_cast<position_t>(before + sums.own);
      before += sums.all;
      dropped += static_cast<std::uint64_t>(lost);
    }
    // A stand-in for a single token would only take that token's place.
    const bool stands_in = block_prefix_sum(block, s, dropped).all >= 2;
    for (index_t b = block.rank(); b < of.count() && !stands_in; b += block_threads) {
      own[b + 1] = 0;
    }
    if (block.rank() != 0) return;
    own[0] = 0;
    standing[item] = static_cast<position_t>(stands_in ? before : 0);
    counts(sequence, kv_head) = standing[item];
  }
};

/// Assigns all KV heads of a sequence as many stand-ins as the head with the most. A head with
/// fewer gets several for each of its first blocks that drop more than one token.
template <class Layer>
struct even_slots_body {
  using memory = typename Layer::memory;
  using shared = warp_values<std::uint64_t>;
  Layer layer;
  index_t block_tokens;
  graded_sizes<memory> graded;
  index_t blocks;
  position_t* slots;
  const position_t* standing;
  view<position_t, 2, memory> counts;

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const auto [sequence, kv_head] = head_place::of(item, layer.kv_heads());
    position_t most = 0;
    for (index_t h = 0; h < layer.kv_heads(); ++h) {
      most = larger{}(most, standing[sequence * layer.kv_heads() + h]);
    }
    if (standing[item] == most) return;
    const dropped_of_blocks<Layer> of{
        graded, sequence, kv_head, layer.tokens(sequence), block_tokens, graded.sizes[sequence]};
    position_t* const own = slots + item * (blocks + 1);
    const auto spare = static_cast<std::uint64_t>(most - standing[item]);
    std::uint64_t before = 0;
    for (index_t first = 0; first < of.count() && before < spare; first += block_threads) {
      const index_t b = first + block.rank();
      const index_t lost = b < of.count() ? of(b) : 0;
      const auto sums =
          block_prefix_sum(block, s, static_cast<std::uint64_t>(lost > 1 ? lost - 1 : 0));
      const std::uint64_t more = before + sums.own < spare ? before + sums.own : spare;
      if (b < of.count()) own[b + 1] += static_cast<position_t>(more);
      before += sums.all;
      if (before < spare) continue;
      for (index_t after = first + block_threads + block.rank(); after < of.count();
           after += block_threads) {
        own[after + 1] += static_cast<position_t>(spare);
      }
    }
    if (block.rank() == 0) counts(sequence, kv_head) = most;
  }
};

}  // namespace refreekv::inline v0::cuda_detail
