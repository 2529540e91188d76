// SPDX-License-Identifier: Apache-2.0
// What an attention row, a window of rows and their chunk statistics are; shared by all backends.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>

#include "refreekv/view.hpp"

namespace refreekv::inline v0 {

/// How a model turns q.k into a logit. In the order applied:
/// scale, soft cap, ALiBi, mask, and a learned sink in the denominator of the softmax.
/// Sliding windows and ALiBi take a token's number in its sequence for its position: the cache must
/// not have been pruned before.
template <class Memory = host_memory>
struct attention_params {
  /// Multiplies q.k; 0 stands for 1 / sqrt(head_dim).
  float scale = 0;
  /// x becomes soft_cap * tanh(x / soft_cap); 0 for none. (Gemma 2)
  float soft_cap = 0;
  /// A query at position p sees positions (p - sliding_window, p]; 0 for all up to p.
  count_t sliding_window = 0;
  /// [q_head]: slope * (token - p) is added. (ALiBi, arXiv 2108.12409)
  view<const float, 1, Memory> alibi_slopes = {};
  /// [q_head]: exp(logit) joins the normaliser, no token gets that share. (gpt-oss)
  view<const float, 1, Memory> sink_logits = {};
};

/// cap * tanh(x / cap), given 1 / cap and exp(2 x / cap); NaN stays NaN. In double: a cap of 50
/// would turn float tanh's last digit into 3e-6 of a logit. tanh is 1 - 2 / (exp + 1), which
/// cancels where x is small beside the cap: there the first two terms of its series are right
/// to 1.4e-13.
[[nodiscard]] REFREEKV_HOST_DEVICE inline float softly_capped(float x, double cap, double inverse,
                                                              double exponential) noexcept {
  const auto wide = static_cast<double>(x);
  const double y = wide * inverse, square = y * y;
  // Both, without a branch: compilers vectorise this.
  const double series = wide * (1 - square * (1.0 / 3));
  const double whole = cap * (1 - 2 / (exponential + 1));
  return static_cast<float>(square >= 1e-6 ? whole : series);
}

/// How the rows of a window become one energy for each token; for one row both are its square.
enum class row_average {
  mean,       ///< the square of the mean over the rows that can see the token (arXiv 2502.16886)
  frobenius,  ///< the sum of squares: the norm is that of the whole [window, token] block (ours)
};

/// The last `rows` queries of a sequence of `tokens` tokens. Row r is the query at `position + r`
/// and sees all tokens up to its own, or up to where `ends` says.
struct query_window {
  index_t tokens;
  index_t rows;
  index_t sliding_window;  ///< as attention_params
  index_t position =
      tokens - rows;    ///< of row 0; without `ends`, rows at negative ones do not exist
  index_t missing = 0;  ///< how many of the first rows do not exist
  const position_t* ends = nullptr;  ///< [row]: see window_rows; null for causal rows
  index_t ends_stride = 1;

  /// The first row that exists; `rows` where none does.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t first_row() const noexcept {
    const index_t first = (ends != nullptr && tokens > 0) || position >= 0 ? 0 : -position;
    return first > missing ? first : missing;
  }

  /// How many rows exist.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t count() const noexcept {
    return rows - first_row();
  }

  /// Tokens that row r sees, at least one. Requires first_row() <= r < rows and tokens > 0.
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

  /// The tokens from the first to the last that any row sees; none where no row exists.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_range hull() const noexcept {
    const index_t first = first_row();
    if (first >= rows || tokens == 0) return {0, 0};
    token_range hull = visible(first);
    if (ends == nullptr) {
      hull.end = position + rows;
    } else {
      for (index_t r = first + 1; r < rows; ++r) {
        const token_range seen = visible(r);
        hull.begin = seen.begin < hull.begin ? seen.begin : hull.begin;
        hull.end = seen.end > hull.end ? seen.end : hull.end;
      }
    }
    return hull;
  }

  /// Whether all `rows` rows exist and see each token of a range.
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

  /// How many rows see the token.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t rows_seeing(index_t token) const noexcept {
    const index_t first_there = first_row();
    if (ends != nullptr) {
      index_t seeing = 0;
      for (index_t r = first_there; r < rows; ++r) {
        const token_range seen = visible(r);
        seeing += seen.begin <= token && token < seen.end ? 1 : 0;
      }
      return seeing;
    }
    const index_t own = token - position;  // the row of the token's own query
    index_t first = own > first_there ? own : first_there;
    index_t last = rows - 1;
    if (sliding_window > 0 && own + sliding_window - 1 < last) last = own + sliding_window - 1;
    return last < first ? 0 : last - first + 1;
  }

  /// Whether there are tokens, and no row that looks at them.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool is_blind() const noexcept {
    return tokens > 0 && count() == 0;
  }

  /// The first token whose own query is a row of the window; `tokens` where none is, and with
  /// `ends`, whose rows may be of other tokens.
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

/// What one read of a chunk leaves of one row. A row's values in a chunk are exp(logit) / 2^unit,
/// with 2^unit at most 2^50 below the largest, so that a float does not underflow where another
/// chunk, the sinks say, has all the mass: candidates are told apart down to 1e-154 of it, where
/// the square of a double ends. Units are whole, so that chunks are compared without an exp. (ours)
struct chunk_statistics {
  float unit;         ///< -inf where the row sees nothing of the chunk
  float sum;          ///< of the values
  float sum_squares;  ///< of the values
};

/// The softmax normaliser of one row.
struct row_normaliser {
  float unit;  ///< the largest of its chunks
  double sum;  ///< of exp(logit) / 2^unit

  /// False where NaN or Inf in what the row sees leaves it without a softmax.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool exists() const noexcept {
    return sum > 0 && sum < HUGE_VAL;
  }
  /// The logarithm of what the row's exponentials sum to.
  [[nodiscard]] REFREEKV_HOST_DEVICE double log_sum() const noexcept {
    return static_cast<double>(unit) * std::numbers::ln2 + std::log(sum);
  }
};

/// 2^n for a whole n; 0 where that would be denormal, infinity from n = 1024 on. NaN stays NaN.
[[nodiscard]] REFREEKV_HOST_DEVICE inline double power_of_two(float n) noexcept {
  if (n < -1022) return 0;
  if (!(n < 1024))
    return static_cast<double>(n) * HUGE_VAL;  // no function, which device code could not call
  const std::uint64_t bits = static_cast<std::uint64_t>(static_cast<int>(n) + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

/// The attention that a value of 1 in a chunk stands for. NaN for a row without a normaliser:
/// nothing is decided on it.
[[nodiscard]] REFREEKV_HOST_DEVICE inline double attention_at(float unit,
                                                              const row_normaliser& row) noexcept {
  return power_of_two(unit - row.unit) / row.sum;
}

/// Joins the statistics [chunk] of a row; `sink_logit` is -inf where the model has none.
[[nodiscard]] REFREEKV_HOST_DEVICE inline row_normaliser normalise(const chunk_statistics* row,
                                                                   index_t chunks,
                                                                   float sink_logit) noexcept {
  const double sink = static_cast<double>(sink_logit) / std::numbers::ln2;
  row_normaliser n{static_cast<float>(std::rint(sink)), 0};
  for (index_t c = 0; c < chunks; ++c) n.unit = row[c].unit > n.unit ? row[c].unit : n.unit;
  // The exp2 that compilers put in its place under -funsafe-math-optimizations knows no infinity.
  n.sum = sink <= -HUGE_VAL ? 0 : std::exp2(sink - static_cast<double>(n.unit));
  for (index_t c = 0; c < chunks; ++c) {
    n.sum += static_cast<double>(row[c].sum) * power_of_two(row[c].unit - n.unit);
  }
  return n;
}

}  // namespace refreekv::inline v0
