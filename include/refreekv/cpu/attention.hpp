// SPDX-License-Identifier: Apache-2.0
// Attention of a window to one chunk of tokens, relative to each row's peak in the chunk.
#pragma once

#include "refreekv/cpu/logits.hpp"

namespace refreekv::inline v0::cpu_detail {

/// What one worker writes to.
struct tile_scratch {
  float* values;    ///< [q_head of the KV head, window, chunk_tokens]
  float* peaks;     ///< [q_head of the KV head, window]
  float* gathered;  ///< [gather_tokens, head_dim]
  float* energies;  ///< [chunk_tokens]
};

/// Below this a value's square would be denormal, which costs more than it weighs: 2e-19 of the
/// chunk's largest.
inline constexpr float lowest_exponent = -43;

/// Fills values with exp(logit - peak), 0 (or nearly so) where a row does not see the token, and
/// peaks, -inf where it sees none. NaN and Inf among a row's logits make all its values NaN.
/// queries: [sequence, q_head, window, head_dim]
template <class Query, class Keys>
void attend(const query_observation<Query, Keys>& seen, const query_window& window,
            index_t sequence, index_t kv_head, token_range range, const float* queries,
            const tile_scratch& tile) noexcept {
  const index_t heads = seen.q_heads() / seen.kv_heads();
  const index_t rows = heads * window.rows;
  const index_t first_head = kv_head * heads;
  dot_range(seen.keys, sequence, kv_head, range,
            queries + (sequence * seen.q_heads() + first_head) * window.rows * seen.head_dim(),
            rows, tile.gathered, tile.values);
  for (index_t i = 0; i < rows; ++i) {
    float* values = tile.values + i * chunk_tokens;
    row_map x(values, range.end - range.begin);
    if (i % window.rows < window.first_row()) {
      x.setZero();
      tile.peaks[i] = -std::numeric_limits<float>::infinity();
      continue;
    }
    finish_logits(seen, window, first_head + i / window.rows, i % window.rows, range, values);
    const float peak =
        x.size() == 0 ? -std::numeric_limits<float>::infinity() : x.maxCoeff<Eigen::PropagateNaN>();
    tile.peaks[i] = peak;
    if (peak == -std::numeric_limits<float>::infinity()) {
      x.setZero();
    } else {
      for (float& value : x) {
        value -= peak;
        value = value < lowest_exponent ? lowest_exponent : value;  // keeps NaN
      }
      x = x.exp();
    }
  }
}

/// The same for ready rows: values are attention / peak, peaks the largest attention.
template <class Row>
void attend(const row_observation<Row>& seen, const query_window& window, index_t sequence,
            index_t kv_head, token_range range, const float*, const tile_scratch& tile) noexcept {
  const index_t heads = seen.q_heads() / seen.kv_heads();
  const index_t stride = seen.rows.stride(3);
  for (index_t i = 0; i < heads * window.rows; ++i) {
    const index_t row = i % window.rows;
    row_map x(tile.values + i * chunk_tokens, range.end - range.begin);
    x.setZero();
    if (row >= window.first_row()) {
      const Row* attention = seen.rows.at(sequence, seen.window() - window.rows + row,
                                          kv_head * heads + i / window.rows);
      const token_range visible = window.visible(row);
      for (index_t t = std::max(range.begin, visible.begin); t < std::min(range.end, visible.end);
           ++t) {
        x(t - range.begin) = widen(attention[t * stride]);
      }
    }
    const float peak = x.size() == 0 ? 0.0f : x.maxCoeff<Eigen::PropagateNaN>();
    tile.peaks[i] = peak;
    if (peak != 0) x /= peak;
  }
}

}  // namespace refreekv::inline v0::cpu_detail
