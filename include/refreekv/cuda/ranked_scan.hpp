// SPDX-License-Identifier: Apache-2.0
// The norm scan along a ranking by score, on a device.
#pragma once

#include "refreekv/cuda/block/key_segments.hpp"
#include "refreekv/cuda/last_allowed.hpp"
#include "refreekv/cuda/top_tokens.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Scratch of rank_tokens and stop_ranked.
struct ranking_scratch {
  key_segments segments;
  std::uint64_t* keys;   ///< [sequence, kv_head, capacity]
  std::uint64_t* spare;  ///< as keys: sorts alternate between both
  index_t* lengths;      ///< [sequence, kv_head]: number of candidates
  double* energies;      ///< [sequence, q_head, block]: energy of the tokens at 256 ranks
  std::uint8_t* marks;   ///< [sequence, kv_head, capacity]: whether a token is kept
  std::byte* temporary;  ///< temporary memory of the sort
  std::size_t temporary_bytes;

  template <class Backend, class Layer>
  [[nodiscard]] static ranking_scratch carve(arena& from, const Backend& exec,
                                             const Layer& layer) noexcept {
    const index_t sequences = layer.sequences(), heads = layer.kv_heads();
    const index_t capacity = layer.capacity();
    ranking_scratch s{};
    s.segments = key_segments::of(exec, sequences * heads, capacity);
    s.keys = from.array<std::uint64_t>(sequences, heads, capacity);
    s.spare = from.array<std::uint64_t>(sequences, heads, capacity);
    s.lengths = from.array<index_t>(sequences, heads);
    s.energies = from.array<double>(sequences, layer.q_heads(), blocks_for(capacity));
    s.marks = from.array<std::uint8_t>(sequences, heads, capacity);
    s.temporary_bytes = sort_bytes(exec, s.segments);
    s.temporary = from.array<std::byte>(s.temporary_bytes);
    return s;
  }
};

/// Writes a sort key for each candidate. Keys order candidates by ascending score, and equal scores
/// by descending position.
template <class Layer>
struct rank_keys_body {
  struct shared {};
  index_t recent;
  Layer layer;
  scores_view<typename Layer::memory> scores;
  ranking_scratch scratch;
  row_parts cut;

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const auto [sequence, head, part, row] = part_place::of(item, layer.kv_heads(), cut.parts);
    const index_t candidates = candidates_of(layer, sequence, recent);
    const value_row of{scores.at(sequence, head), scores.stride(2)};
    const key_segments segments = scratch.segments;
    const index_t slots = segments.together ? segments.capacity : candidates;
    for (index_t i = part * block_threads + block.rank(); i < slots;
         i += cut.parts * block_threads) {
      const index_t token = i < candidates ? candidates - 1 - i : 0;
      const float score = i < candidates ? of(token) : not_a_number;
      const std::uint32_t bits = score == score ? ordered_bits(score) : key_segments::no_score;
      scratch.keys[row * segments.capacity + i] = segments.key(row, bits, token);
    }
    if (part == 0 && block.rank() == 0) scratch.lengths[row] = candidates;
  }
};

/// Writes the order from the sorted keys, and the energies of each block of 256 ranks. If a head
/// has no order, because of NaN, its first entry is -1.
template <class Layer>
struct rank_energies_body {
  using shared = warp_values<double>;
  index_t recent;
  Layer layer;
  scores_view<typename Layer::memory> weights;
  const std::uint64_t* sorted;  ///< [sequence, kv_head, capacity]
  position_t* order;
  ranking_scratch scratch;
  row_parts cut;

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t row = item / cut.parts;
    const index_t candidates = candidates_of(layer, row / layer.kv_heads(), recent);
    if (candidates == 0) return;
    const std::uint64_t last = sorted[row * layer.capacity() + candidates - 1];
    if (scratch.segments.score_of(last) == key_segments::no_score) {
      if (item % cut.parts == 0 && block.rank() == 0) order[row * layer.capacity()] = -1;
      return;
    }
    for (index_t b = item % cut.parts; b * block_threads < candidates; b += cut.parts) {
      weigh(block, s, row, b, candidates);
    }
  }

 private:
  template <thread_block Block>
  REFREEKV_DEVICE void weigh(Block& block, shared& s, index_t row, index_t b,
                             index_t candidates) const noexcept {
    const index_t sequence = row / layer.kv_heads(), head = row % layer.kv_heads();
    const index_t i = b * block_threads + block.rank();
    position_t token = 0;
    if (i < candidates) {
      token = scratch.segments.token_of(sorted[row * layer.capacity() + i]);
      order[row * layer.capacity() + i] = token;
    }
    const index_t group = layer.q_heads() / layer.kv_heads(), blocks = blocks_for(layer.capacity());
    for (index_t h = head * group; h < (head + 1) * group; ++h) {
      const double weight = i < candidates ? double{weights(sequence, h, token)} : 0;
      const double energy = block_reduce(block, s, weight * weight, plus{});
      if (block.rank() == 0) {
        scratch.energies[(sequence * layer.q_heads() + h) * blocks + b] = energy;
      }
    }
  }
};

/// Writes the norms along the order; 0 past the last candidate, NaN at 0 without an order.
template <class Layer>
struct rank_norms_body {
  using shared = warp_values<double>;
  index_t recent;
  Layer layer;
  scores_view<typename Layer::memory> weights;
  const position_t* order;
  double* norms;
  ranking_scratch scratch;
  row_parts cut;

  /// item: [sequence, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t sequence = item / cut.parts, capacity = layer.capacity();
    const index_t candidates = candidates_of(layer, sequence, recent);
    const bool ordered = candidates == 0 || is_ordered(block, sequence);
    for (index_t b = item % cut.parts; b * block_threads < capacity; b += cut.parts) {
      const index_t i = b * block_threads + block.rank();
      double norm = !ordered && i == 0 ? double{not_a_number} : 0;
      if (ordered && b * block_threads < candidates) {
        for (index_t h = 0; h < layer.q_heads(); ++h) {
          norm += std::sqrt(energy_from(block, s, sequence, h, b, candidates));
        }
      }
      if (i < capacity) norms[sequence * capacity + i] = norm;
    }
  }

 private:
  /// Whether all heads have an order. Requires at least one candidate.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE bool is_ordered(Block& block, index_t sequence) const noexcept {
    bool ordered = true;
    for (index_t h = block.rank(); h < layer.kv_heads(); h += block_threads) {
      ordered = ordered && order[(sequence * layer.kv_heads() + h) * layer.capacity()] >= 0;
    }
    return block.sync_and(ordered);
  }

  /// Returns the sum of squared weights from the thread's own rank on.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE double energy_from(Block& block, shared& s, index_t sequence,
                                                   index_t head, index_t b,
                                                   index_t candidates) const noexcept {
    const index_t blocks = blocks_for(layer.capacity());
    const double* energies = scratch.energies + (sequence * layer.q_heads() + head) * blocks;
    double after = 0;
    for (index_t p = b + 1 + block.rank(); p * block_threads < candidates; p += block_threads) {
      after += energies[p];
    }
    after = block_reduce(block, s, after, plus{});
    const index_t i = b * block_threads + block.rank();
    const index_t kv_head = head / (layer.q_heads() / layer.kv_heads());
    const index_t row = (sequence * layer.kv_heads() + kv_head) * layer.capacity();
    const double weight = i < candidates ? double{weights(sequence, head, order[row + i])} : 0;
    return block_suffix_sum(block, s, weight * weight).own + after;
  }
};

template <class Backend, class Layer>
[[nodiscard]] status rank_tokens(const Backend& exec, index_t recent, const Layer& layer,
                                 const scores_view<typename Layer::memory>& scores,
                                 const scores_view<typename Layer::memory>& weights,
                                 position_t* order, double* norms,
                                 const ranking_scratch& scratch) noexcept {
  const index_t heads = kv_head_items(layer), blocks = blocks_for(layer.capacity());
  if (heads == 0 || layer.capacity() == 0) return status::ok;
  const row_parts of_heads = row_parts::of(heads, blocks);
  const rank_keys_body<Layer> keys{recent, layer, scores, scratch, of_heads};
  status s = run_blocks(exec, of_heads.items(), keys);
  if (s != status::ok) return s;
  std::uint64_t *sorted = scratch.keys, *spare = scratch.spare;
  s = sort_segments(exec, scratch.segments, sorted, spare, scratch.lengths, scratch.temporary,
                    scratch.temporary_bytes);
  if (s != status::ok) return s;
  const rank_energies_body<Layer> energies{recent, layer,   weights, sorted,
                                           order,  scratch, of_heads};
  s = run_blocks(exec, of_heads.items(), energies);
  if (s != status::ok) return s;
  const row_parts of_sequences = row_parts::of(layer.sequences(), blocks);
  const rank_norms_body<Layer> curve{recent, layer, weights, order, norms, scratch, of_sequences};
  return run_blocks(exec, of_sequences.items(), curve);
}

/// Keeps the tokens of a head's order from the cut on, and the recent tokens.
template <class Layer>
struct stop_ranked_body {
  using memory = typename Layer::memory;
  struct shared {
    warp_values<index_t> cuts;
    warp_values<std::uint64_t> counts;
  };
  double threshold;
  index_t recent;
  Layer layer;
  const double* norms;
  const position_t* order;
  kept_positions<memory> kept;
  std::uint8_t* marks;

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const auto [sequence, head] = head_place::of(item, layer.kv_heads());
    const index_t tokens = layer.tokens(sequence);
    const index_t candidates = candidates_of(layer, sequence, recent);
    const double* curve = norms + sequence * layer.capacity();
    if (candidates == 0) return keep_tokens(block, kept, sequence, head, tokens);
    if (!norm_scan::decidable(curve[0])) {
      return keep_tokens(block, kept, sequence, head, tokens, true);
    }
    norm_scan scan{};
    scan.threshold = threshold;
    const index_t cut = last_allowed(block, s.cuts, scan, curve, candidates, curve[0]);

    std::uint8_t* is_kept = marks + item * layer.capacity();
    for (index_t t = block.rank(); t < candidates; t += block_threads) is_kept[t] = 0;
    block.sync();
    const position_t* row = order + item * layer.capacity();
    for (index_t i = cut + block.rank(); i < candidates; i += block_threads) is_kept[row[i]] = 1;
    block.sync();
    keep_where(block, s.counts, kept, sequence, head, candidates, tokens,
               [&](index_t t) { return is_kept[t] != 0; });
  }
};

template <class Backend, class Layer>
[[nodiscard]] status stop_ranked(const Backend& exec, double threshold, index_t recent,
                                 const Layer& layer, const double* norms, const position_t* order,
                                 const kept_positions<typename Layer::memory>& kept,
                                 const ranking_scratch& scratch) noexcept {
  const stop_ranked_body<Layer> body{threshold, recent, layer, norms, order, kept, scratch.marks};
  return run_blocks(exec, kv_head_items(layer), body);
}

}  // namespace refreekv::inline v0::cuda_detail
