// SPDX-License-Identifier: Apache-2.0
// The norm scan along a ranking by score, on a device.
#pragma once

#include "refreekv/cuda/last_allowed.hpp"
#include "refreekv/cuda/top_tokens.hpp"

namespace refreekv::inline v0::cuda_detail {

struct ranking_scratch {
  std::uint64_t* keys;    ///< [sequence, kv_head, capacity]
  std::uint64_t* sorted;  ///< the same
  index_t* lengths;       ///< [sequence, kv_head]: keys of each head; 0 where NaN leaves no order
  double* energies;       ///< [sequence, q_head, block]: of the tokens of 256 ranks
  std::uint8_t* marks;    ///< [sequence, kv_head, capacity]: whether a token is kept
  std::byte* temporary;   ///< the sort's
  std::size_t temporary_bytes;

  template <class Backend, class Seen>
  [[nodiscard]] static ranking_scratch take(arena& from, const Backend& on,
                                            const Seen& seen) noexcept {
    const index_t sequences = seen.sequences(), heads = seen.kv_heads();
    const index_t capacity = seen.capacity();
    ranking_scratch s{};
    s.keys = from.take<std::uint64_t>(sequences, heads, capacity);
    s.sorted = from.take<std::uint64_t>(sequences, heads, capacity);
    s.lengths = from.take<index_t>(sequences, heads);
    s.energies = from.take<double>(sequences, seen.q_heads(), blocks_for(capacity));
    s.marks = from.take<std::uint8_t>(sequences, heads, capacity);
    s.temporary_bytes = sort_bytes(on, sequences * heads, capacity);
    s.temporary = from.take<std::byte>(s.temporary_bytes);
    return s;
  }
};

/// Writes for each candidate a key: in their order are first the lowest scores, and among equals
/// the last positions.
template <class Seen>
struct rank_keys_body {
  struct shared {};
  index_t recent;
  Seen seen;
  scores_view<typename Seen::memory> scores;
  ranking_scratch scratch;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.kv_heads();
  }

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t sequence = item / seen.kv_heads(), head = item % seen.kv_heads();
    const index_t candidates = candidates_of(seen, sequence, recent);
    const value_row row{scores.at(sequence, head), scores.stride(2)};
    std::uint64_t* keys = scratch.keys + item * seen.capacity();
    bool ordered = true;
    for (index_t t = block.rank(); t < candidates; t += block_threads) {
      const float score = row(t);
      ordered = ordered && score == score;
      keys[t] = std::uint64_t{ordered_bits(score)} << 32 | static_cast<std::uint32_t>(~t);
    }
    ordered = block.sync_and(ordered);
    if (block.rank() == 0) scratch.lengths[item] = ordered ? candidates : 0;
  }
};

/// Writes the order out of the sorted keys, and what the tokens of a block of it weigh.
template <class Seen>
struct rank_energies_body {
  using shared = warp_values<double>;
  index_t recent;
  Seen seen;
  scores_view<typename Seen::memory> weights;
  position_t* order;
  ranking_scratch scratch;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.kv_heads() * blocks_for(seen.capacity());
  }

  /// item: [sequence, kv_head, block]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t blocks = blocks_for(seen.capacity()), part = item % blocks, row = item / blocks;
    const index_t sequence = row / seen.kv_heads(), head = row % seen.kv_heads();
    const index_t candidates = candidates_of(seen, sequence, recent);
    const index_t i = part * block_threads + block.rank();
    if (part * block_threads >= candidates) return;
    if (scratch.lengths[row] == 0) {
      if (i == 0) order[row * seen.capacity()] = -1;
      return;
    }
    position_t token = 0;
    if (i < candidates) {
      token = static_cast<position_t>(~scratch.sorted[row * seen.capacity() + i] & 0xffffffffu);
      order[row * seen.capacity() + i] = token;
    }
    const index_t group = seen.q_heads() / seen.kv_heads();
    for (index_t h = head * group; h < (head + 1) * group; ++h) {
      const double weight = i < candidates ? double{weights(sequence, h, token)} : 0;
      const double energy = block_reduce(block, s, weight * weight, plus{});
      if (block.rank() == 0) {
        scratch.energies[(sequence * seen.q_heads() + h) * blocks + part] = energy;
      }
    }
  }
};

/// Writes the norms of a block of the order.
template <class Seen>
struct rank_norms_body {
  using shared = warp_values<double>;
  index_t recent;
  Seen seen;
  scores_view<typename Seen::memory> weights;
  const position_t* order;
  double* norms;
  ranking_scratch scratch;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * blocks_for(seen.capacity());
  }

  /// item: [sequence, block]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t blocks = blocks_for(seen.capacity()), part = item % blocks;
    const index_t sequence = item / blocks, candidates = candidates_of(seen, sequence, recent);
    const index_t i = part * block_threads + block.rank();
    double norm = 0;
    if (part * block_threads < candidates) {
      if (is_ordered(block, sequence)) {
        for (index_t h = 0; h < seen.q_heads(); ++h) {
          norm += std::sqrt(energy_from(block, s, sequence, h, part, candidates));
        }
      } else if (i == 0) {
        norm = not_a_number;
      }
    }
    if (i < seen.capacity()) norms[sequence * seen.capacity() + i] = norm;
  }

 private:
  /// Whether all heads have an order. Requires candidates.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE bool is_ordered(Block& block, index_t sequence) const noexcept {
    bool ordered = true;
    for (index_t h = block.rank(); h < seen.kv_heads(); h += block_threads) {
      ordered = ordered && scratch.lengths[sequence * seen.kv_heads() + h] > 0;
    }
    return block.sync_and(ordered);
  }

  /// The squared weights of all from the thread's own rank on.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE double energy_from(Block& block, shared& s, index_t sequence,
                                                   index_t head, index_t part,
                                                   index_t candidates) const noexcept {
    const index_t blocks = blocks_for(seen.capacity());
    const double* energies = scratch.energies + (sequence * seen.q_heads() + head) * blocks;
    double after = 0;
    for (index_t p = part + 1 + block.rank(); p * block_threads < candidates; p += block_threads) {
      after += energies[p];
    }
    after = block_reduce(block, s, after, plus{});
    const index_t i = part * block_threads + block.rank();
    const index_t kv_head = head / (seen.q_heads() / seen.kv_heads());
    const index_t row = (sequence * seen.kv_heads() + kv_head) * seen.capacity();
    const double weight = i < candidates ? double{weights(sequence, head, order[row + i])} : 0;
    return block_suffix_sum(block, s, weight * weight).own + after;
  }
};

template <class Backend, class Seen>
[[nodiscard]] status rank_tokens(const Backend& on, index_t recent, const Seen& seen,
                                 const scores_view<typename Seen::memory>& scores,
                                 const scores_view<typename Seen::memory>& weights,
                                 position_t* order, double* norms,
                                 const ranking_scratch& scratch) noexcept {
  const index_t segments = seen.sequences() * seen.kv_heads();
  if (segments == 0 || seen.capacity() == 0) return status::ok;
  const rank_keys_body<Seen> keys{recent, seen, scores, scratch};
  status s = run_blocks(on, keys.items(), keys);
  if (s != status::ok) return s;
  s = sort_segments(on, scratch.keys, scratch.sorted, segments, seen.capacity(), scratch.lengths,
                    scratch.temporary, scratch.temporary_bytes);
  if (s != status::ok) return s;
  const rank_energies_body<Seen> energies{recent, seen, weights, order, scratch};
  s = run_blocks(on, energies.items(), energies);
  if (s != status::ok) return s;
  const rank_norms_body<Seen> curve{recent, seen, weights, order, norms, scratch};
  return run_blocks(on, curve.items(), curve);
}

/// Keeps what comes from the cut on in a head's order.
template <class Seen>
struct stop_ranked_body {
  using memory = typename Seen::memory;
  struct shared {
    warp_values<index_t> cuts;
    warp_values<std::uint64_t> counts;
  };
  double threshold;
  index_t recent;
  Seen seen;
  const double* norms;
  const position_t* order;
  kept_positions<memory> kept;
  std::uint8_t* marks;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.kv_heads();
  }

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t sequence = item / seen.kv_heads(), head = item % seen.kv_heads();
    const index_t tokens = seen.tokens(sequence);
    const index_t candidates = candidates_of(seen, sequence, recent);
    const double* curve = norms + sequence * seen.capacity();
    if (candidates == 0) return keep_tokens(block, kept, sequence, head, tokens);
    if (!norm_scan::decidable(curve[0])) {
      return keep_tokens(block, kept, sequence, head, tokens, true);
    }
    norm_scan scan{};
    scan.threshold = threshold;
    const index_t cut = last_allowed(block, s.cuts, scan, curve, candidates, curve[0]);

    std::uint8_t* is_kept = marks + item * seen.capacity();
    for (index_t t = block.rank(); t < candidates; t += block_threads) is_kept[t] = 0;
    block.sync();
    const position_t* row = order + item * seen.capacity();
    for (index_t i = cut + block.rank(); i < candidates; i += block_threads) is_kept[row[i]] = 1;
    block.sync();
    keep_where(block, s.counts, kept, sequence, head, candidates, tokens,
               [&](index_t t) { return is_kept[t] != 0; });
  }
};

template <class Backend, class Seen>
[[nodiscard]] status stop_ranked(const Backend& on, double threshold, index_t recent,
                                 const Seen& seen, const double* norms, const position_t* order,
                                 const kept_positions<typename Seen::memory>& kept,
                                 const ranking_scratch& scratch) noexcept {
  const stop_ranked_body<Seen> body{threshold, recent, seen, norms, order, kept, scratch.marks};
  return run_blocks(on, body.items(), body);
}

}  // namespace refreekv::inline v0::cuda_detail
