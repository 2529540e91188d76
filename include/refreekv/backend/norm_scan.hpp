// SPDX-License-Identifier: Apache-2.0
// The loss curve over cuts and the rule that stops on it; arithmetic shared by all backends.
#pragma once

#include <cmath>

#include "refreekv/attention/chunk_statistics.hpp"
#include "refreekv/core/chunks.hpp"
#include "refreekv/core/workspace.hpp"
#include "refreekv/decision/position_ranking.hpp"

namespace refreekv::inline v0 {

/// How the rows of a window become one energy for each token; for one row both are its square.
enum class row_average {
  mean,       ///< the square of the mean over the rows that can see the token (arXiv 2502.16886)
  frobenius,  ///< the sum of squares: the norm is that of the whole [window, token] block (ours)
};

/// What the norm is taken over.
enum class norm_scope {
  candidates,  ///< tokens [cut, n); the sinks are outside (the released code)
  full_row,    ///< sinks and [cut, n) (arXiv 2502.16886, equation 3 read literally)
};

/// Which query heads share one cut.
enum class cut_scope {
  layer,    ///< all of the layer (arXiv 2502.16886)
  kv_head,  ///< those of one KV head (ours)
};

/// loss(c) = 1 - norm(c) / norm(sinks), where norm(c) sums over the heads of a group the root of
/// the energy of tokens [c, n) (a mean would cancel). The cut is the largest c with
/// loss(c) <= threshold. (arXiv 2502.16886, algorithm 1)
struct norm_scan {
  double threshold;  ///< in [0, 1]
  index_t sinks;
  index_t window;  ///< rows used of each sequence
  row_average average;
  norm_scope norm;
  cut_scope scope;

  /// Cuts of each sequence.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t groups(index_t kv_heads) const noexcept {
    return scope == cut_scope::layer ? 1 : kv_heads;
  }

  /// The first chunk of candidates, where there are any.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t first_chunk() const noexcept {
    return chunking::of_sinks(sinks);
  }

  /// One read of the keys gives chunk energies from statistics; a mean of several rows does not.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool one_pass() const noexcept {
    return average == row_average::frobenius || window == 1;
  }

  /// False where nothing can be decided: an empty, NaN or infinite norm keeps every token.
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr bool decidable(double baseline) noexcept {
    return baseline > 0 && baseline < HUGE_VAL;
  }
  /// Whether there is anything to decide about a sequence of `tokens` tokens, whose norms [chunk]
  /// at the chunks' starts are given.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool decides(index_t tokens,
                                                            const double* norms) const noexcept {
    return tokens > sinks && decidable(norms[first_chunk()]);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr double loss(double norm,
                                                                  double baseline) noexcept {
    return 1 - norm / baseline;
  }

  /// The last index of a falling curve [count] whose loss is allowed; 0 where none is: whoever asks
  /// knows that the curve's start is. O(count).
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t last_allowed(
      const double* curve, index_t count, double baseline) const noexcept {
    index_t last = count - 1;
    while (last > 0 && !(loss(curve[last], baseline) <= threshold)) --last;
    return last;
  }

  /// The chunk in which the cut lies, from norms [chunk] at the chunks' starts. Requires a
  /// decidable norm of the first chunk of candidates.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t crossing(const double* norms,
                                                                index_t chunks) const noexcept {
    const index_t first = first_chunk();
    return first + last_allowed(norms + first, chunks - first, norms[first]);
  }
};

/// What a scan works in. Carved by `take`; shapes in brackets, `chunk` padded to `chunks`.
/// Of each sequence 12 * chunks + 16 bytes for each row of a query head, and 8 * chunks + 3072 for
/// each group.
struct norm_scan_buffers {
  index_t chunks;                ///< of the longest sequence the cache can hold
  chunk_statistics* statistics;  ///< [sequence, q_head, window, chunk]
  row_normaliser* rows;          ///< [sequence, q_head, window]
  double* norms;                 ///< [sequence, group, chunk]: the partial curve, summed over ranks
  double* chunk_norms;  ///< [sequence, group, chunk_tokens]: the curve inside the crossing chunk
  float* chunk_masses;  ///< [sequence, group, chunk_tokens]: attention dropped by a cut there

  template <class Observation>
  [[nodiscard]] static norm_scan_buffers carve(arena& from, const norm_scan& scan,
                                               const Observation& layer) noexcept {
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

/// What is kept of a sequence that is cut at the token `last` of its chunk `crossing`. baseline:
/// norm(sinks); norm and mass: of the curves inside the chunk, at that token.
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr kept_range cut_at(const norm_scan& scan,
                                                               index_t tokens, index_t crossing,
                                                               index_t last, double baseline,
                                                               double norm, float mass) noexcept {
  const position_ranking ranking(tokens, scan.sinks);
  kept_range kept = ranking.from(chunking{tokens, scan.sinks}[crossing].begin + last);
  if (kept.dropped() > 0) {
    // Two roundings meet here, of a sum over chunks and of one over tokens.
    const double loss = norm_scan::loss(norm, baseline);
    kept.loss = static_cast<float>(loss < 0 ? 0 : loss < scan.threshold ? loss : scan.threshold);
    kept.dropped_mass = mass;
  }
  return kept;
}

/// What is kept of a sequence, from its summed curves. norms: [chunk]; chunk_norms, chunk_masses:
/// [chunk_tokens] of the crossing chunk.
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
