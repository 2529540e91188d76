// SPDX-License-Identifier: Apache-2.0
// The decode index on the CPU: 4-bit keys, and Quest's page bounds.
#pragma once

#include "refreekv/attention/page_bounds.hpp"
#include "refreekv/cpu/top_tokens.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Calls f(token, key) for tokens [first, tokens) of one head. key(d) returns dimension d as a
/// float.
template <kv_source Keys, class F>
void for_each_key(const Keys& keys, index_t sequence, index_t kv_head, index_t first,
                  const F& f) noexcept {
  for (index_t t = first; t < keys.tokens(sequence);) {
    const auto run = keys.run_at(sequence, kv_head, t);
    for (index_t i = 0; i < run.tokens && t < keys.tokens(sequence); ++i, ++t) {
      const auto* key = run.data + i * run.token_stride;
      f(t, [&](index_t d) { return widen(key[d * run.dim_stride]); });
    }
  }
}

/// Returns the smaller of the two; NaN if either is NaN.
[[nodiscard]] inline float smaller_or_nan(float low, float x) noexcept {
  return x < low || std::isnan(x) ? x : low;
}

/// Writes the mean of the finite elements of one head's keys to centre [head_dim]. O(tokens *
/// head_dim).
template <kv_source Keys>
void find_centre(const Keys& keys, index_t sequence, index_t kv_head, float* centre) noexcept {
  constexpr index_t together = 64;  // dimensions summed in one read of the keys
  for (index_t begin = 0; begin < keys.shape().head_dim; begin += together) {
    const index_t dims = (std::min)(together, keys.shape().head_dim - begin);
    double sums[together] = {};
    index_t counts[together] = {};
    for_each_key(keys, sequence, kv_head, 0, [&](index_t, const auto& key) {
      for (index_t d = 0; d < dims; ++d) {
        const float x = key(begin + d);
        const bool finite = std::isfinite(x);
        sums[d] += finite ? static_cast<double>(x) : 0;
        counts[d] += finite ? 1 : 0;
      }
    });
    for (index_t d = 0; d < dims; ++d) {
      const auto count = static_cast<double>(std::max<index_t>(counts[d], 1));
      centre[begin + d] = static_cast<float>(sums[d] / count);
    }
  }
}

template <class Executor, kv_source Keys>
void quantise(const Executor& threads, const Keys& keys, const lengths_view<>& from,
              const int4_keys<>& to) noexcept {
  const index_t dims = keys.shape().head_dim;
  for_each_head(threads, keys.shape(), keys.shape().head_dim, [&](int, index_t s, index_t h) {
    const index_t first = from.data() == nullptr ? 0 : index_t{from(s)};
    float* centre = to.centres.at(s, h);
    if (centre != nullptr && first == 0) find_centre(keys, s, h, centre);
    const auto write = [&](index_t t, const auto& key) {
      float low = key(0), high = key(0);
      for (index_t d = 1; d < dims; ++d) {
        low = smaller_or_nan(low, key(d));
        high = -smaller_or_nan(-high, -key(d));
      }
      const float step = (std::max)(high - low, 1e-9f) / 15;
      to.ranges(s, h, t, 0) = low;
      to.ranges(s, h, t, 1) = step;
      std::uint8_t* codes = to.codes.at(s, h, t);
      for (index_t d = 0; d < dims; ++d) {
        const float code = std::rint((key(d) - low) / step);
        const auto bits = static_cast<unsigned>(code >= 0 && code <= 15 ? code
                                                : code > 15             ? 15
                                                                        : 0);
        codes[d / 2] = static_cast<std::uint8_t>(d % 2 == 0 ? bits : codes[d / 2] | bits << 4);
      }
    };
    for_each_key(keys, s, h, first, [&](index_t t, const auto& key) {
      if (centre == nullptr) {
        write(t, key);
      } else {
        write(t, [&](index_t d) { return key(d) - centre[d]; });
      }
    });
  });
}

template <class Executor, kv_source Keys>
void bound_pages(const Executor& threads, const Keys& keys, const lengths_view<>& from,
                 const page_bounds<>& to) noexcept {
  for_each_head(threads, keys.shape(), keys.shape().head_dim, [&](int, index_t s, index_t h) {
    const index_t first = from.data() == nullptr ? 0 : index_t{from(s)};
    const index_t start = first / to.page_tokens * to.page_tokens;
    for_each_key(keys, s, h, start, [&](index_t t, const auto& key) {
      for (index_t d = 0; d < keys.shape().head_dim; ++d) {
        float& low = to.bounds(s, h, t / to.page_tokens, 0, d);
        float& high = to.bounds(s, h, t / to.page_tokens, 1, d);
        const float x = key(d);
        const bool starts = t % to.page_tokens == 0;
        low = starts ? x : smaller_or_nan(low, x);
        high = starts ? x : -smaller_or_nan(-high, -x);
      }
    });
  });
}

template <class Executor, class Layer>
void select_pages(const Executor& threads, const page_bounds<>& pages, index_t tokens_kept,
                  const Layer& layer, const scores_view<>& scores,
                  const selection_scratch& scratch) noexcept {
  const index_t group = layer.q_heads() / layer.kv_heads();
  for_each_head(threads, layer.shape(), group, [&](int worker, index_t s, index_t h) {
    const index_t tokens = layer.tokens(s), size = pages.page_tokens;
    const index_t wanted =
        std::max<index_t>(1, tokens_kept / size) + (tokens_kept % size != 0 ? 1 : 0);
    // Pages that the last query row does not see have no score and use none of the budget.
    const token_range visible = window_of(layer, s, 1).hull();
    const index_t first = visible.begin / size, count = (visible.end + size - 1) / size;
    if (wanted >= count - first) return;
    for (index_t g = 0; g < group; ++g) {
      const index_t q_head = h * group + g;
      const auto page_score = [&](index_t page) {
        float score = 0;
        for (index_t d = 0; d < layer.head_dim(); ++d) {
          const float q = widen(layer.queries(s, layer.window() - 1, q_head, d));
          const float low = q * pages.bounds(s, h, page, 0, d);
          const float high = q * pages.bounds(s, h, page, 1, d);
          score += low > high ? low : high;
        }
        return score;
      };
      float* values = scratch.values_of(worker);
      float* scores_of_pages = values + scratch.capacity;
      for (index_t page = first; page < count; ++page) {
        values[page - first] = scores_of_pages[page] = page_score(page);
      }
      if (any_nan(values, 1, count - first)) continue;
      value_limit limit = limit_of_largest(values, count - first, wanted);
      for (index_t page = first; page < count; ++page) {
        if (limit.selects(scores_of_pages[page])) continue;
        const index_t end = (std::min)(tokens, (page + 1) * size);
        for (index_t t = page * size; t < end; ++t) scores(s, q_head, t) = 0;
      }
    }
  });
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
