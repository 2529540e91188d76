// SPDX-License-Identifier: Apache-2.0
// Writes the positions that a head keeps.
#pragma once

#include "refreekv/cuda/block/places.hpp"
#include "refreekv/cuda/block/value_row.hpp"
#include "refreekv/decision/kept_positions.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Writes the positions of one head's tokens [begin, end) for which holds(t), from place `first`
/// on. Returns their number.
template <class Memory, thread_block Block, class Predicate>
REFREEKV_DEVICE index_t write_where(Block& block, warp_values<std::uint64_t>& shared,
                                    const kept_positions<Memory>& kept, index_t sequence,
                                    index_t head, token_range tokens, index_t first,
                                    const Predicate& holds) noexcept {
  position_t* to = kept.positions.at(sequence, head);
  const index_t stride = kept.positions.stride(2);
  return for_each_selected(
      block, shared, tokens.end - tokens.begin, [&](index_t t) { return holds(tokens.begin + t); },
      [&](index_t i, index_t t) {
        to[stride * (first + i)] = static_cast<position_t>(tokens.begin + t);
      });
}

/// Writes the positions of all tokens [begin, end) of one head, from place `first` on. `parts`
/// blocks share the work; this one is number `part`.
template <class Memory, thread_block Block>
REFREEKV_DEVICE void write_all(const Block& block, const kept_positions<Memory>& kept,
                               index_t sequence, index_t head, token_range tokens, index_t first,
                               index_t part = 0, index_t parts = 1) noexcept {
  for (index_t t = tokens.begin + part * block_threads + block.rank(); t < tokens.end;
       t += parts * block_threads) {
    kept.positions(sequence, head, first + t - tokens.begin) = static_cast<position_t>(t);
  }
}

/// Keeps one head's tokens of [0, candidates) for which holds(t), and all tokens after them.
template <class Memory, thread_block Block, class Predicate>
REFREEKV_DEVICE void keep_where(Block& block, warp_values<std::uint64_t>& shared,
                                const kept_positions<Memory>& kept, index_t sequence, index_t head,
                                index_t candidates, index_t tokens,
                                const Predicate& holds) noexcept {
  const index_t held = write_where(block, shared, kept, sequence, head, {0, candidates}, 0, holds);
  write_all(block, kept, sequence, head, {candidates, tokens}, held);
  if (block.rank() == 0) {
    kept.counts(sequence, head) = {static_cast<position_t>(held + tokens - candidates),
                                   static_cast<position_t>(tokens)};
  }
}

/// Keeps all tokens of one head.
template <class Memory, thread_block Block>
REFREEKV_DEVICE void keep_tokens(const Block& block, const kept_positions<Memory>& kept,
                                 index_t sequence, index_t head, index_t tokens,
                                 bool undecided = false) noexcept {
  write_all(block, kept, sequence, head, {0, tokens}, 0);
  if (block.rank() == 0) {
    kept.counts(sequence, head) = {static_cast<position_t>(tokens), static_cast<position_t>(tokens),
                                   undecided};
  }
}

/// Keeps all tokens of every head.
template <class Layer>
struct keep_all_body {
  struct shared {};
  Layer layer;
  kept_positions<typename Layer::memory> kept;

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const auto [sequence, head] = head_place::of(item, layer.kv_heads());
    keep_tokens(block, kept, sequence, head, layer.tokens(sequence));
  }
};

template <class Backend, class Layer>
[[nodiscard]] status keep_all(const Backend& exec, const Layer& layer,
                              const kept_positions<typename Layer::memory>& kept) noexcept {
  const keep_all_body<Layer> body{layer, kept};
  return run_blocks(exec, kv_head_items(layer), body);
}

/// Keeps all tokens of a sequence if any of its heads is undecided, and marks all heads undecided.
template <class Layer>
struct keep_undecided_body {
  struct shared {};
  Layer layer;
  kept_positions<typename Layer::memory> kept;

  /// item: sequence
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t sequence) const noexcept {
    const index_t heads = layer.kv_heads();
    bool decided = true;
    for (index_t h = block.rank(); h < heads; h += block_threads) {
      decided = decided && !kept.counts(sequence, h).undecided;
    }
    if (block.sync_and(decided)) return;
    for (index_t h = 0; h < heads; ++h) {
      keep_tokens(block, kept, sequence, h, layer.tokens(sequence), true);
    }
  }
};

}  // namespace refreekv::inline v0::cuda_detail
