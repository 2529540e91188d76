// SPDX-License-Identifier: Apache-2.0
// The tensors of one layer as plain arrays. Caches of any layout and type are filled from them.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "refreekv/refreekv.hpp"

using refreekv::count_t;
using refreekv::index_t;
using refreekv::position_t;

/// Rows of a cache: for each sequence [kv_head, token, head_dim].
struct plain_rows {
  index_t kv_heads, head_dim;
  std::vector<position_t> lengths;
  std::vector<std::vector<float>> values;

  plain_rows(index_t heads, index_t dim, std::vector<position_t> tokens)
      : kv_heads(heads), head_dim(dim), lengths(std::move(tokens)) {
    for (const position_t n : lengths) {
      values.emplace_back(static_cast<std::size_t>(kv_heads * n * head_dim));
    }
  }
  index_t sequences() const { return static_cast<index_t>(lengths.size()); }
  index_t longest() const {
    return lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  }
  float& at(index_t s, index_t h, index_t t, index_t d) {
    const auto i = static_cast<std::size_t>(s);
    return values[i][static_cast<std::size_t>((h * lengths[i] + t) * head_dim + d)];
  }
  float at(index_t s, index_t h, index_t t, index_t d) const {
    return const_cast<plain_rows&>(*this).at(s, h, t, d);
  }
};

/// The inputs of one layer: keys, queries and the parameters of attention.
struct problem {
  index_t group, head_dim, window;
  std::vector<position_t> lengths;
  plain_rows keys;
  std::vector<float> queries;  // [sequence, window, q_head, head_dim]
  float scale = 0, soft_cap = 0;
  count_t sliding_window = 0;
  std::vector<float> alibi_slopes, sink_logits;  // [q_head], or empty
  std::vector<position_t> row_counts;            // [sequence], or empty
  std::vector<position_t> row_ends;              // [sequence, window], or empty

  problem(index_t kv_heads, index_t heads_of_group, index_t dim, index_t rows,
          std::vector<position_t> tokens)
      : group(heads_of_group),
        head_dim(dim),
        window(rows),
        lengths(tokens),
        keys(kv_heads, dim, std::move(tokens)),
        queries(static_cast<std::size_t>(keys.sequences() * rows * kv_heads * group * dim)) {}

  index_t sequences() const { return keys.sequences(); }
  index_t q_heads() const { return keys.kv_heads * group; }
  float& query(index_t s, index_t r, index_t h, index_t d) {
    return queries[static_cast<std::size_t>(((s * window + r) * q_heads() + h) * head_dim + d)];
  }
  float query(index_t s, index_t r, index_t h, index_t d) const {
    return const_cast<problem&>(*this).query(s, r, h, d);
  }
  float key(index_t s, index_t h, index_t t, index_t d) const { return keys.at(s, h, t, d); }

  refreekv::view<const float, 4> query_view() const {
    return {queries.data(), {sequences(), window, q_heads(), head_dim}};
  }
  refreekv::layer_info<> info(index_t layer = 9) const {
    refreekv::layer_info<> i{.index = layer};
    i.attention.scale = scale;
    i.attention.soft_cap = soft_cap;
    i.attention.sliding_window = sliding_window;
    if (!alibi_slopes.empty()) i.attention.alibi_slopes = {alibi_slopes.data(), {q_heads()}};
    if (!sink_logits.empty()) i.attention.sink_logits = {sink_logits.data(), {q_heads()}};
    if (!row_counts.empty()) i.rows.counts = {row_counts.data(), {sequences()}};
    if (!row_ends.empty()) i.rows.ends = {row_ends.data(), {sequences(), window}};
    return i;
  }

  /// The first row of a sequence that exists; `window` if none does.
  index_t first_row(index_t s) const {
    const index_t n = lengths[static_cast<std::size_t>(s)];
    const index_t given = row_counts.empty() ? 0 : window - row_counts[static_cast<std::size_t>(s)];
    return n == 0 ? window : row_ends.empty() ? std::max(given, window - n) : given;
  }
  bool sees(index_t s, index_t row, index_t token) const {
    const index_t n = lengths[static_cast<std::size_t>(s)], position = n - window + row;
    if (row < first_row(s)) return false;
    const index_t end =
        row_ends.empty() ? position + 1 : row_ends[static_cast<std::size_t>(s * window + row)];
    return token < end && (sliding_window == 0 || position - token < sliding_window);
  }
};

/// The seed of all random tests: REFREEKV_SEED, or else a fixed one. Failures print it.
inline unsigned base_seed() {
  const char* text = std::getenv("REFREEKV_SEED");
  return text != nullptr ? static_cast<unsigned>(std::strtoul(text, nullptr, 10)) : 20251124u;
}

class random_source {
 public:
  explicit random_source(unsigned seed) : engine_(seed) {}
  index_t between(index_t low, index_t high) {
    return std::uniform_int_distribution<index_t>(low, high)(engine_);
  }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[between(0, static_cast<index_t>(values.size()) - 1)];
  }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  float normal(float scale = 1) { return scale * std::normal_distribution<float>()(engine_); }
  std::mt19937& engine() { return engine_; }

 private:
  std::mt19937 engine_;
};

/// Fills queries and keys so that sinks, recent tokens or a needle may dominate, as in real models.
inline void fill(problem& p, random_source& random) {
  const float spread = random.one_of({0.2f, 1.0f, 2.0f});
  for (float& q : p.queries) q = random.normal(spread);
  const float sink = random.one_of({0.0f, 0.5f, 1.5f});
  const float recent = random.one_of({0.0f, 0.3f, 0.8f});
  for (index_t s = 0; s < p.sequences(); ++s) {
    const index_t n = p.lengths[static_cast<std::size_t>(s)];
    for (index_t h = 0; h < p.keys.kv_heads; ++h) {
      for (index_t t = 0; t < n; ++t) {
        const float pull = (t < 4 ? sink : 0) +
                           recent * static_cast<float>(t) / static_cast<float>(n) +
                           (random.chance(0.01) ? 0.7f : 0);
        for (index_t d = 0; d < p.head_dim; ++d) {
          p.keys.at(s, h, t, d) = random.normal() + pull * p.query(s, p.window - 1, h * p.group, d);
        }
      }
    }
  }
}

/// Sometimes marks rows as missing and writes NaN in their place, and sometimes gives rows an end
/// that is not causal.
inline void add_rows(problem& p, random_source& random) {
  if (random.chance(0.25)) {
    for (index_t s = 0; s < p.sequences(); ++s) {
      const index_t missing = random.chance(0.3) ? 0 : random.between(0, p.window);
      p.row_counts.push_back(static_cast<position_t>(p.window - missing));
      for (index_t r = 0; r < missing; ++r) {
        for (index_t h = 0; h < p.q_heads(); ++h) {
          p.query(s, r, h, 0) = std::numeric_limits<float>::quiet_NaN();
        }
      }
    }
  }
  if (random.chance(0.2)) {
    const bool all = random.chance(0.4);
    for (index_t s = 0; s < p.sequences(); ++s) {
      const index_t n = p.lengths[static_cast<std::size_t>(s)];
      for (index_t r = 0; r < p.window; ++r) {
        // With a sliding window, the row still sees at least one token.
        const index_t least =
            p.sliding_window == 0 ? 1 : std::max<index_t>(1, n - p.window + r + 1);
        p.row_ends.push_back(
            static_cast<position_t>(all ? n : random.between(least, std::max(n, least))));
      }
    }
  }
}
