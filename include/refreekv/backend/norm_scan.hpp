// SPDX-License-Identifier: Apache-2.0
// How a decision is made; the loss curve and its stop rule, arithmetic that all backends share.
#pragma once

#include <cmath>

#include "refreekv/attention/chunk_statistics.hpp"
#include "refreekv/core/chunks.hpp"
#include "refreekv/core/exactly.hpp"
#include "refreekv/core/workspace.hpp"
#include "refreekv/decision/position_ranking.hpp"

// How a decision is made
//
// ReFreeKV (arXiv 2502.16886) drops one range of tokens: those between the sinks and the cut. It
// finds the cut from the attention of the last query rows. policy::refreekv calls five primitives
// of backend.hpp for that, and lets ranks exchange their results between them. CP: context
// parallel ranks have other tokens. TP: tensor parallel ranks have other heads. A single rank
// exchanges nothing. One sequence with a threshold of 0.01 (x, S, Q, X, Z and E: see below):
//
//              sinks |<------------------------ candidates ----------------------->|
//   token      0     s           s+256       s+512       s+768       s+1024        n for each
//              +-----+-----------+-----------+-----------+-----------+-------------+
//   chunk      |  0  |     1     |     2     |     3     |     4     |      5      |
//              +-----+-----------+-----------+-----------+-----------+-------------+
//   1. read    x,S,Q     x,S,Q       x,S,Q       x,S,Q       x,S,Q        x,S,Q      query row
//   2. row     \_______________________________ X,Z _______________________________/ query row
//   3. energy              E1          E2          E3          E4           E5       q_head
//      norm(c)       |<----------|<----------|<----------|<----------|<------------| group
//      loss(c)       0           .001        .004        .030        .200            group
//   4. again                                 |.004..*.030|                           group
//   5. kept    #####                                cut############################
//
// 1. read_chunks reads every key once. For each (query row, chunk) it writes three floats: the
//    exponent x, and the sum S and the sum of squares Q of exp(logit) / 2^x (chunk_statistics).
//    CP: a token_exchange gathers these statistics from all ranks.
// 2. normalise_rows computes the softmax normaliser of each row from all its chunks, sinks too:
//    X = the largest x, Z = sum over chunks of S * 2^(x - X), plus the model's sink logit if any.
//    A value of 1 in a chunk is then an attention of w = 2^(x - X) / Z (weight_of). Ready
//    attention rows are normalised already: X = 0, Z = 1.
//    A mean over several rows (window > 1) needs the sum over rows before the square. Only then are
//    all keys read a second time: a chunk's energy replaces the Q of its first row that exists,
//    relative to the square of the chunk's largest w. CP: a second token_exchange gathers the
//    statistics.
// 3. norm_curve computes the energy of each chunk, the sum over rows of w^2 * Q or that of the
//    second read. Suffix sums from the end are the energy of tokens [c, n) at each chunk's start
//    c; norm_scope::full_row adds the energy of the sinks. norm(c) is the sum over the query heads
//    of a group of the root of that energy. TP: a head_reduction sums the norms.
//    loss(c) = 1 - norm(c) / norm(sinks), where norm(sinks) is the norm of a cut that drops
//    nothing.
// 4. crossing_curve finds the chunk in which the loss crosses the threshold: the last one whose
//    start is within it. It reads the keys of this chunk again, at most 256 tokens for each group,
//    and continues the suffix sums token by token. It writes the norm of a cut at each of these
//    tokens, and the mass: the largest attention that a row gives to the candidates before it.
//    CP: token_exchanges gather norms and masses from the rank that has the chunk. TP: a
//    head_reduction sums the norms; masses stay those of a rank's own heads.
// 5. find_cuts cuts at the last token of this chunk whose loss is within the threshold. Tokens
//    [0, sinks) and [cut, n) stay. If norm(sinks) is 0, NaN or infinite, all tokens stay.

namespace refreekv::inline v0 {

/// How the rows of a window become one energy for each token. With one row both are the square of
/// its attention.
enum class row_average {
  mean,       ///< the square of the mean over the rows that can see the token (arXiv 2502.16886)
  frobenius,  ///< the sum of squares: the norm is that of the whole [window, token] block (ours)
};

/// The tokens that the norm is taken over.
enum class norm_scope {
  candidates,  ///< tokens [cut, n); sinks are outside (the released code)
  full_row,    ///< sinks and [cut, n) (arXiv 2502.16886, equation 3 read literally)
};

/// The query heads that share one cut.
enum class cut_scope {
  layer,    ///< all of the layer (arXiv 2502.16886)
  kv_head,  ///< the query heads of one KV head (ours)
};

/// The options of a norm scan. loss(c) = 1 - norm(c) / norm(sinks). norm(c) is the sum over the
/// heads of a group of the root of the energy of tokens [c, n); a mean would cancel in the
/// quotient. The cut is the largest c with loss(c) <= threshold. (arXiv 2502.16886, algorithm 1)
struct norm_scan {
  double threshold;  ///< in [0, 1]
  index_t sinks;     ///< first tokens that always stay
  index_t window;    ///< query rows of each sequence that are used
  row_average average;
  norm_scope norm;
  cut_scope scope;

  /// The number of cuts of each sequence.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t groups(index_t kv_heads) const noexcept {
    return scope == cut_scope::layer ? 1 : kv_heads;
  }

  /// The first chunk of candidates, if there are candidates.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t first_chunk() const noexcept {
    return chunking::of_sinks(sinks);
  }

  /// Whether one read of the keys suffices: chunk energies then follow from `statistics`. A mean
  /// over several rows requires a second read.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool one_pass() const noexcept {
    return average == row_average::frobenius || window == 1;
  }

  /// False where nothing can be decided: with a norm of 0, NaN or infinity every token stays.
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr bool decidable(double baseline) noexcept {
    return baseline > 0 && baseline < HUGE_VAL;
  }
  /// Whether there is anything to decide about a sequence of `tokens` tokens. norms [chunk]: its
  /// norms at the chunks' starts.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool decides(index_t tokens,
                                                            const double* norms) const noexcept {
    return tokens > sinks && decidable(norms[first_chunk()]);
  }
  /// The share of the baseline that a cut with this norm loses.
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr double loss(double norm,
                                                                  double baseline) noexcept {
    return 1 - norm / baseline;
  }

  /// Largest index of a falling curve [count] whose loss is within the threshold. Requires that
  /// index 0 qualifies; it is not tested. O(count).
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t last_allowed(
      const double* curve, index_t count, double baseline) const noexcept {
    index_t last = count - 1;
    while (last > 0 && !(loss(curve[last], baseline) <= threshold)) --last;
    return last;
  }

  /// The chunk that holds the cut, from norms [chunk] at the chunks' starts. Requires a decidable
  /// norm of the first chunk of candidates. O(chunks).
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t crossing(const double* norms,
                                                                index_t chunks) const noexcept {
    const index_t first = first_chunk();
    return first + last_allowed(norms + first, chunks - first, norms[first]);
  }
};

/// The buffers of a scan, in the caller's workspace; `carve` carves them. Shapes are in brackets;
/// `chunk` is padded to `chunks`. Each sequence has 12 * chunks + 16 bytes for each row of a query
/// head, and 8 * chunks + 3072 bytes for each group.
struct norm_scan_buffers {
  index_t chunks;                ///< chunks of the longest sequence that the cache can hold
  chunk_statistics* statistics;  ///< [sequence, q_head, window, chunk]
  row_normaliser* rows;          ///< [sequence, q_head, window]
  double* norms;  ///< [sequence, group, chunk]: the curve at chunks' starts, summed over ranks
  double* chunk_norms;  ///< [sequence, group, chunk_tokens]: the curve inside the crossing chunk
  float* chunk_masses;  ///< [sequence, group, chunk_tokens]: attention that a cut there drops

  template <class Layer>
  [[nodiscard]] static norm_scan_buffers carve(arena& from, const norm_scan& scan,
                                               const Layer& layer) noexcept {
    const index_t chunks = chunking{layer.capacity(), scan.sinks}.count();
    const index_t sequences = layer.sequences();
    const index_t q_heads = layer.q_heads();
    const index_t groups = scan.groups(layer.kv_heads());
    return {chunks,
            from.array<chunk_statistics>(sequences, q_heads, scan.window, chunks),
            from.array<row_normaliser>(sequences, q_heads, scan.window),
            from.array<double>(sequences, groups, chunks),
            from.array<double>(sequences, groups, chunk_tokens),
            from.array<float>(sequences, groups, chunk_tokens)};
  }
};

namespace detail {

/// The largest attention that a value of 1 in a chunk stands for, over rows [first_row, window);
/// NaN if any row's is NaN. statistics: [window], `stride` elements apart; rows: [window].
/// O(window).
[[nodiscard]] REFREEKV_SHARED double largest_attention(const chunk_statistics* statistics,
                                                       index_t stride, const row_normaliser* rows,
                                                       index_t first_row, index_t window) noexcept {
  double largest = 0;
  REFREEKV_NO_UNROLL
  for (index_t r = first_row; r < window; ++r) {
    const double attention = weight_of(statistics[r * stride].exponent, rows[r]);
    largest = attention > largest || std::isnan(attention) ? attention : largest;
  }
  return largest;
}

/// The energy of a chunk for one query head: the squared attention that the norm sums over tokens.
/// After a second read, sum_squares of the first row is that of the rows' mean. Arguments as those
/// of `largest_attention`. O(window).
[[nodiscard]] REFREEKV_SHARED double chunk_energy(const norm_scan& scan,
                                                  const chunk_statistics* statistics,
                                                  index_t stride, const row_normaliser* rows,
                                                  index_t first_row) noexcept {
  if (first_row == scan.window) return 0;
  if (!scan.one_pass()) {
    const double largest = largest_attention(statistics, stride, rows, first_row, scan.window);
    const auto squares = static_cast<double>(statistics[first_row * stride].sum_squares);
    return largest * exactly(largest * squares);
  }
  double energy = 0;
  REFREEKV_NO_UNROLL
  for (index_t r = first_row; r < scan.window; ++r) {
    const chunk_statistics& row = statistics[r * stride];
    const double attention = weight_of(row.exponent, rows[r]);
    energy += attention * exactly(attention * static_cast<double>(row.sum_squares));
  }
  return energy;
}

/// The kept range of a sequence that is cut at token `last` of its chunk `crossing`. baseline:
/// norm(sinks); norm and mass: the curves inside the chunk, at that token.
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr kept_range cut_at(const norm_scan& scan,
                                                               index_t tokens, index_t crossing,
                                                               index_t last, double baseline,
                                                               double norm, float mass) noexcept {
  const position_ranking ranking(tokens, scan.sinks);
  kept_range kept = ranking.from(chunking{tokens, scan.sinks}[crossing].begin + last);
  if (kept.dropped() > 0) {
    // The sums over chunks and over tokens round differently: the loss may be just out of range.
    const double loss = norm_scan::loss(norm, baseline);
    kept.loss = static_cast<float>(loss < 0 ? 0 : loss < scan.threshold ? loss : scan.threshold);
    kept.dropped_mass = mass;
  }
  return kept;
}

/// The kept range of a sequence, by the stop rule on its summed curves. norms: [chunk];
/// chunk_norms, chunk_masses: [chunk_tokens] of the crossing chunk. O(chunks + chunk_tokens).
[[nodiscard]] constexpr kept_range stop(const norm_scan& scan, index_t tokens, const double* norms,
                                        const double* chunk_norms,
                                        const float* chunk_masses) noexcept {
  const chunking chunks{tokens, scan.sinks};
  if (!scan.decides(tokens, norms)) return position_ranking(tokens, scan.sinks).undecided();
  const double baseline = norms[scan.first_chunk()];
  const index_t crossing = scan.crossing(norms, chunks.count());
  const token_range range = chunks[crossing];
  const index_t last = scan.last_allowed(chunk_norms, range.end - range.begin, baseline);
  return cut_at(scan, tokens, crossing, last, baseline, chunk_norms[last], chunk_masses[last]);
}

}  // namespace detail

}  // namespace refreekv::inline v0
