// SPDX-License-Identifier: Apache-2.0
// The tokens that each of a sequence's last queries sees.
#pragma once

#include "refreekv/core/config.hpp"

namespace refreekv::inline v0 {

/// The last `rows` queries of a sequence of `tokens` tokens. Row r is the query at position
/// `position + r`. It sees all tokens up to its own or, with `ends`, all before the end of row r.
struct query_window {
  index_t tokens;
  index_t rows;
  index_t sliding_window;  ///< in tokens, as in attention_params
  index_t position =
      tokens - rows;    ///< of row 0; without `ends`, rows at negative positions do not exist
  index_t missing = 0;  ///< number of first rows that do not exist
  const position_t* ends = nullptr;  ///< [row], as window_rows::ends; null for causal rows
  index_t ends_stride = 1;

  /// The first row that exists; `rows` if no row exists.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t first_row() const noexcept {
    const index_t first = (ends != nullptr && tokens > 0) || position >= 0 ? 0 : -position;
    return first > missing ? first : missing;
  }

  /// The number of rows that exist.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t count() const noexcept {
    return rows - first_row();
  }

  /// The tokens that a row sees, at least one. Requires first_row() <= row < rows and tokens > 0.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_range visible(index_t row) const noexcept {
    index_t end = position + row + 1;
    index_t begin = sliding_window > 0 && sliding_window < end ? end - sliding_window : 0;
    if (ends != nullptr) {
      end = ends[row * ends_stride];
      end = end < 1 ? 1 : end < tokens ? end : tokens;
      begin = begin < end ? begin : end - 1;
    }
    return {begin, end};
  }

  /// The smallest range with all tokens that any row sees; empty if no row exists.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_range hull() const noexcept {
    const index_t first = first_row();
    if (first >= rows || tokens == 0) return {0, 0};
    token_range hull = visible(first);
    if (ends == nullptr) {
      hull.end = position + rows;
    } else {
      for (index_t r = first + 1; r < rows; ++r) {
        const token_range range = visible(r);
        hull.begin = range.begin < hull.begin ? range.begin : hull.begin;
        hull.end = range.end > hull.end ? range.end : hull.end;
      }
    }
    return hull;
  }

  /// Whether all `rows` rows exist and each of them sees every token of a range.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool all_see(token_range range) const noexcept {
    if (first_row() > 0) return false;
    if (ends == nullptr) {
      return visible(0).end >= range.end && visible(rows - 1).begin <= range.begin;
    }
    for (index_t r = 0; r < rows; ++r) {
      const token_range seen = visible(r);
      if (seen.begin > range.begin || seen.end < range.end) return false;
    }
    return true;
  }

  /// The number of rows that see the token.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t rows_seeing(index_t token) const noexcept {
    const index_t first_there = first_row();
    if (ends != nullptr) {
      index_t seeing = 0;
      for (index_t r = first_there; r < rows; ++r) {
        const token_range range = visible(r);
        seeing += range.begin <= token && token < range.end ? 1 : 0;
      }
      return seeing;
    }
    const index_t own = token - position;  // the row of the token's own query
    index_t first = own > first_there ? own : first_there;
    index_t last = rows - 1;
    if (sliding_window > 0 && own + sliding_window - 1 < last) last = own + sliding_window - 1;
    return last < first ? 0 : last - first + 1;
  }

  /// Whether there are tokens but no row that sees them.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool is_blind() const noexcept {
    return tokens > 0 && count() == 0;
  }

  /// The first token whose own query is a row of the window; `tokens` if there is none. Also
  /// `tokens` with `ends`, because the rows may then belong to other tokens.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t first_new_token() const noexcept {
    const index_t own = position + first_row();
    return ends != nullptr || own > tokens ? tokens : own < 0 ? 0 : own;
  }

  /// The window of rows [first, first + count) alone.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr query_window part(index_t first,
                                                                 index_t count) const noexcept {
    query_window part = *this;
    part.rows = count;
    part.position = position + first;
    part.missing = missing > first ? missing - first : 0;
    if (ends != nullptr) part.ends = ends + first * ends_stride;
    return part;
  }
};

}  // namespace refreekv::inline v0
