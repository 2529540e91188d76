// SPDX-License-Identifier: Apache-2.0
// The scratch of policy::faithful's primitives on a device.
#pragma once

#include "refreekv/cuda/block/limit_search.hpp"
#include "refreekv/cuda/token_scores.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The score at the last place of one or more sizes in a ranking, and the candidates with exactly
/// this score ("equals").
struct score_limit {
  float value;
  grade first, last;  ///< the sizes [first, last] end at this score
  /// The grade of all equals; 0 if their grades differ, which their order then decides.
  grade of_equals;
  index_t rank;    ///< place of the first equal, from 0
  index_t equals;  ///< number of equals
};
/// The limits of one ranking, from the largest score to the smallest.
struct score_limits {
  index_t candidates;
  int count;
  score_limit of[max_sizes];
};

/// State of a bisection: the smallest size that is enough is in (low, high].
struct size_range {
  position_t low, high;

  [[nodiscard]] REFREEKV_DEVICE bool is_open() const noexcept { return high - low > 1; }
  /// The size to try next while the range is open, then the result.
  [[nodiscard]] REFREEKV_DEVICE position_t middle() const noexcept {
    return is_open() ? low + (high - low) / 2 : high;
  }
};

/// Tokens of a split of scores, which one block counts.
inline constexpr index_t split_tokens = 16 * chunk_tokens;

/// Splits of a sequence's tokens for summing outputs. One block sums a split, chunk by chunk.
/// Splits grow with the number of rows, because more rows need fewer splits to fill a device.
struct output_splits {
  index_t tokens;  ///< per split
  index_t count;   ///< splits of the longest sequence

  /// rows: the measured rows of a KV head. capacity: tokens of the longest sequence.
  [[nodiscard]] static constexpr output_splits of(index_t rows, index_t capacity) noexcept {
    const index_t tokens = split_tokens * ((rows + 31) / 32);
    return {tokens, tokens > 0 ? (capacity + tokens - 1) / tokens : 0};
  }
  /// Splits of a sequence of `length` tokens.
  [[nodiscard]] REFREEKV_DEVICE index_t used(index_t length) const noexcept {
    return (length + tokens - 1) / tokens;
  }
};

/// The scratch of policy::faithful's primitives. R is the number of rows of all query heads of a KV
/// head, E the number of measured ones; d and v are the head_dim of keys and values. Bytes for each
/// KV head: 4 per token, 4 per block of positions, 8 R + 4 R d + 8 d + 8 E (v + 2), and the largest
/// of
/// - 16 R, plus 12 min(R, 128) per chunk of 256 tokens,
/// - 8 d per chunk,
/// - 512 sizes per 4,096 tokens,
/// - 8 n (n + 1), where n is the smaller of R and d,
/// - 8 min(E, 32) (v + 1) per 4,096 tokens.
/// Example: 4 query heads, d = v = 128 and the policy's default options need 12 bytes per token
/// plus 120 KB, and at least 200 KB.
struct importance_scratch {
  index_t rows;    ///< per query head
  index_t chunks;  ///< of the longest sequence
  index_t splits;  ///< splits of the scores of the longest sequence
  output_splits outputs;
  index_t blocks;        ///< blocks of positions of the longest sequence
  index_t measured;      ///< measured rows per query head
  double* log_sums;      ///< [sequence, q_head, rows]: log of the sum of exponentials
  float* attention;      ///< [sequence, kv_head, capacity]: mean over all rows
  double* anchors;       ///< [sequence, kv_head, head_dim]: mean direction of the keys
  double* spreads;       ///< [sequence, kv_head, chunk]: sum of the squared logit spreads
  std::uint8_t* bad;     ///< [sequence, kv_head, chunk]: 1 if a score is not finite, else 0
  float* map;            ///< [sequence, q_head, rows, head_dim]: see ridge.hpp
  position_t* slots;     ///< [sequence, kv_head, block + 1]: a block's first stand-in
  position_t* standing;  ///< [sequence, kv_head]: stand-ins, counted at one per block
  size_range* ranges;    ///< [sequence]
  double* whole;         ///< [sequence, kv_head, measured row, dim of values + 1]: see outputs_body
  double* row_errors;    ///< [sequence, q_head, measured]
  score_limits* limits;  ///< [sequence, ranking]
  std::byte* shared;     ///< memory for one of the arrays below at a time

  /// The scratch of normalise_rows.
  template <class Layer>
  [[nodiscard]] static attention_scratch carve_normalising(arena& from, const importance_rule& rule,
                                                           const Layer& layer) noexcept {
    return attention_scratch::carve(from, rule.rows, layer);
  }
  /// [sequence, kv_head, chunk, head_dim]: see directions_body.
  template <class Layer>
  [[nodiscard]] double* carve_directions(arena& from, const Layer& layer) const noexcept {
    return from.array<double>(layer.sequences(), layer.kv_heads(), chunks, layer.head_dim());
  }
  /// [sequence, kv_head, chunk, sizes]: sums of the scores of each grade.
  template <class Layer>
  [[nodiscard]] double* carve_grade_sums(arena& from, const importance_rule& rule,
                                         const Layer& layer) const noexcept {
    return from.array<double>(layer.sequences(), layer.kv_heads(), chunks, index_t{rule.sizes});
  }
  /// [sequence, kv_head, order + 1, order]: see regression.
  template <class Layer>
  [[nodiscard]] double* carve_normal(arena& from, const Layer& layer) const noexcept {
    const index_t of_head = layer.q_heads() / layer.kv_heads() * rows, dims = layer.head_dim();
    const index_t order = of_head < dims ? of_head : dims;
    return from.array<double>(layer.sequences(), layer.kv_heads(), order + 1, order);
  }
  /// [sequence, kv_head, split, measured row, dim of values + 1]: see outputs_body.
  template <class Layer>
  [[nodiscard]] double* carve_outputs(arena& from, const Layer& layer) const noexcept {
    return from.array<double>(layer.sequences(), outputs.count, layer.q_heads(), measured,
                              layer.values.shape().head_dim + 1);
  }

  template <class Layer>
  [[nodiscard]] static importance_scratch carve(arena& from, const importance_rule& rule,
                                                const Layer& layer) noexcept {
    const index_t sequences = layer.sequences(), kv_heads = layer.kv_heads();
    importance_scratch s{};
    arena normalising, directions, search, sums, normal, of_rows;
    s.rows = carve_normalising(normalising, rule, layer).window;
    s.chunks = chunking{layer.capacity(), 0}.count();
    s.splits = (layer.capacity() + split_tokens - 1) / split_tokens;
    s.blocks = rule.blocks(layer.capacity());
    s.measured = rule.measured(s.rows);
    s.outputs = output_splits::of(layer.q_heads() / kv_heads * s.measured, layer.capacity());
    s.log_sums = from.array<double>(sequences, layer.q_heads(), s.rows);
    s.anchors = from.array<double>(sequences, kv_heads, layer.head_dim());
    s.spreads = from.array<double>(sequences, kv_heads, s.chunks);
    s.bad = from.array<std::uint8_t>(sequences, kv_heads, s.chunks);
    s.ranges = from.array<size_range>(sequences);
    s.limits = from.array<score_limits>(sequences,
                                        rule.scope == cut_scope::kv_head ? index_t{1} : kv_heads);
    (void)s.carve_directions(directions, layer);
    (void)limit_parts::carve(search, rule, layer, s.splits);
    (void)s.carve_grade_sums(sums, rule, layer);
    if (rule.stand_ins) {
      s.attention = from.array<float>(sequences, kv_heads, layer.capacity());
      s.map = from.array<float>(sequences, layer.q_heads(), s.rows, layer.head_dim());
      s.slots = from.array<position_t>(sequences, kv_heads, s.blocks + 1);
      s.standing = from.array<position_t>(sequences, kv_heads);
      (void)s.carve_normal(normal, layer);
    }
    if (rule.error_term) {
      s.whole = from.array<double>(sequences, layer.q_heads(), s.measured,
                                   layer.values.shape().head_dim + 1);
      s.row_errors = from.array<double>(sequences, layer.q_heads(), s.measured);
      (void)s.carve_outputs(of_rows, layer);
    }
    std::size_t bytes = 0;
    for (const arena* part : {&normalising, &directions, &search, &sums, &normal, &of_rows}) {
      bytes = part->bytes() > bytes ? part->bytes() : bytes;
    }
    s.shared = from.array<std::byte>(bytes);
    return s;
  }

  /// An arena over the shared memory.
  [[nodiscard]] arena carve() const noexcept { return arena(shared); }
};

}  // namespace refreekv::inline v0::cuda_detail
