// SPDX-License-Identifier: Apache-2.0
// Selects tokens by score on the CPU: the best ones, or the fewest that hold a share of the sum.
#pragma once

#include <algorithm>
#include <cmath>

#include "refreekv/backend/norm_scan.hpp"
#include "refreekv/cpu/token_scores.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Scratch: for each worker two copies of a row of scores, and a mark for each token.
struct selection_scratch {
  float* values;        ///< [worker, 2, capacity]
  std::uint8_t* marks;  ///< [worker, capacity]
  index_t capacity;     ///< elements; each row fills whole cache lines

  template <class Layer>
  static selection_scratch carve(arena& from, index_t workers, const Layer& layer) noexcept {
    selection_scratch s{};
    constexpr index_t line = arena::alignment;
    s.capacity = (layer.capacity() + line - 1) / line * line;
    s.values = from.array<float>(workers, 2, s.capacity);
    s.marks = from.array<std::uint8_t>(workers, s.capacity);
    return s;
  }

  [[nodiscard]] float* values_of(index_t worker) const noexcept {
    return values + worker * 2 * capacity;
  }
  [[nodiscard]] std::uint8_t* marks_of(index_t worker) const noexcept {
    return marks + worker * capacity;
  }
};

/// Writes the kept positions of one (sequence, kv_head). Requires positions in ascending order.
class position_writer {
 public:
  position_writer(const kept_positions<>& kept, index_t sequence, index_t head) noexcept
      : to_(kept.positions.at(sequence, head)),
        stride_(kept.positions.stride(2)),
        kept_(kept.counts(sequence, head)) {}
  void append(index_t position) noexcept {
    to_[stride_ * count_++] = static_cast<position_t>(position);
  }
  void append_range(index_t begin, index_t end) noexcept {
    for (index_t t = begin; t < end; ++t) append(t);
  }
  void finish(index_t tokens, bool undecided = false) noexcept {
    kept_ = {static_cast<position_t>(count_), static_cast<position_t>(tokens), undecided};
  }

 private:
  position_t* to_;
  index_t stride_;
  kept_tokens& kept_;
  index_t count_ = 0;
};

inline void keep_all(const kept_positions<>& kept, index_t sequence, index_t head, index_t tokens,
                     bool undecided = false) noexcept {
  position_writer writer(kept, sequence, head);
  writer.append_range(0, tokens);
  writer.finish(tokens, undecided);
}

/// The limit of a selection: the smallest selected value, and how many of its equals are selected.
/// The first equals in order are selected.
struct value_limit {
  float least;
  index_t equals;

  /// Returns whether the next value, in order, is selected.
  [[nodiscard]] bool selects(float value) noexcept {
    return value > least || (value >= least && equals-- > 0);
  }
};

/// Returns the limit that selects the k largest of values [count]. Requires 0 < k <= count and no
/// NaN. Reorders values. O(count) expected.
inline value_limit limit_of_largest(float* values, index_t count, index_t k) noexcept {
  std::nth_element(values, values + k - 1, values + count, [](float a, float b) { return a > b; });
  const float least = values[k - 1];
  return {least, k - std::count_if(values, values + k, [&](float v) { return v > least; })};
}

/// Returns the limit that selects the fewest of values [count] that sum to at least `needed`. If
/// all of them sum to less, it selects all values that are not 0. Requires values >= 0. Reorders
/// values. O(count) expected. (ours)
inline value_limit limit_by_mass(float* values, index_t count, double needed) noexcept {
  float* first = values;
  float* last = std::partition(values, values + count, [](float v) { return v > 0; });
  value_limit limit{first == last ? 0 : *std::min_element(first, last), count};
  while (first != last) {
    float* middle = first + (last - first) / 2;
    const float pivot =
        (std::max)((std::min)(*first, *middle), (std::min)((std::max)(*first, *middle), last[-1]));
    float* equal = std::partition(first, last, [&](float v) { return v > pivot; });
    float* less = std::partition(equal, last, [&](float v) { return v >= pivot; });
    double above = 0;
    for (const float* v = first; v != equal; ++v) above += static_cast<double>(*v);
    if (above >= needed && first != equal) {
      last = equal;
      continue;
    }
    const auto equals = static_cast<double>(less - equal);
    if (above + equals * static_cast<double>(pivot) >= needed) {
      const double wanted = std::ceil((needed - above) / static_cast<double>(pivot));
      return {pivot, static_cast<index_t>(std::clamp(wanted, 1.0, equals))};
    }
    needed -= above + equals * static_cast<double>(pivot);
    first = less;
  }
  return limit;
}

/// Returns the limit that selects all values above a threshold, equals included. Twilight's
/// published kernel finds this threshold by bisection, from the first value as the upper bound.
/// Requires normalised attention. O(count * steps).
inline value_limit limit_of_bisection(const float* values, index_t count, float share) noexcept {
  constexpr float precision = 1e-5f;
  float low = 0, high = values[0];
  for (;;) {
    const float middle = (low + high) / 2;
    float next = high, previous = low, above = 0;
    for (index_t t = 0; t < count; ++t) {
      const float v = values[t];
      if (v > low && v < next) next = v;
      if (v <= high && v > previous) previous = v;
      if (v > middle) above += v;
    }
    if (above >= share) {
      low = middle;
    } else {
      high = (std::min)(middle, previous);
    }
    if (!(previous - next > precision)) break;
  }
  return {std::nextafter(low, std::numeric_limits<float>::infinity()), count};
}

/// Returns whether any of values [count], `stride` elements apart, is NaN. O(count).
inline bool any_nan(const float* values, index_t stride, index_t count) noexcept {
  bool nan = false;
  for (index_t t = 0; t < count; ++t) nan |= std::isnan(values[t * stride]);
  return nan;
}

/// Writes the scores of all heads to scratch [sequence, kv_head, capacity] and reorders them there.
template <class Executor, class Layer>
void share_quotas(const Executor& threads, double floor, const token_quota* quotas,
                  const Layer& layer, const scores_view<>& scores, token_quota* shared,
                  float* scratch) noexcept {
  const index_t heads = layer.kv_heads(), elements = layer.sequences() * heads * layer.capacity();
  for_each_item(threads, layer.sequences(), elements * 4, [&](int, index_t s) {
    const token_quota quota = quotas[s];
    token_quota* own = std::fill_n(shared + s * heads, heads, quota) - heads;
    const index_t candidates = std::max<index_t>(0, layer.tokens(s) - quota.recent);
    if (quota.ranked >= candidates) return;
    const index_t stride = scores.stride(2);
    float* values = scratch + s * heads * layer.capacity();
    for (index_t h = 0; h < heads; ++h) {
      const float* row = scores.at(s, h);
      float* copy = values + h * candidates;
      for (index_t t = 0; t < candidates; ++t) copy[t] = row[t * stride];
    }
    if (quota.ranked == 0 || any_nan(values, 1, heads * candidates)) return;
    value_limit limit = limit_of_largest(values, heads * candidates, heads * quota.ranked);
    for (index_t h = 0; h < heads; ++h) {
      const float* row = scores.at(s, h);
      index_t best = 0;
      for (index_t t = 0; t < candidates; ++t) best += limit.selects(row[t * stride]) ? 1 : 0;
      own[h] = quota.of_head(floor, best);
    }
  });
}

template <class Executor, class Layer>
void top_tokens(const Executor& threads, const quotas_view<>& quotas, const Layer& layer,
                const scores_view<>& scores, const kept_positions<>& kept,
                const selection_scratch& scratch) noexcept {
  for_each_head(threads, layer.shape(), 4, [&](int worker, index_t s, index_t h) {
    const index_t tokens = layer.tokens(s);
    const auto [ranked, recent] = quotas(s, h);
    const index_t candidates = std::max<index_t>(0, tokens - recent);
    bool& undecided = kept.counts(s, h).undecided;
    if (undecided) return;
    if (ranked >= candidates) return keep_all(kept, s, h, tokens);
    const float* row = scores.at(s, h);
    const index_t stride = scores.stride(2);
    undecided = any_nan(row, stride, candidates);
    if (undecided) return;
    value_limit limit{std::numeric_limits<float>::infinity(), 0};
    if (ranked > 0) {
      float* values = scratch.values_of(worker);
      for (index_t t = 0; t < candidates; ++t) values[t] = row[t * stride];
      limit = limit_of_largest(values, candidates, ranked);
    }
    position_writer writer(kept, s, h);
    for (index_t t = 0; t < candidates; ++t) {
      if (limit.selects(row[t * stride])) writer.append(t);
    }
    writer.append_range(candidates, tokens);
    writer.finish(tokens);
  });
  for (index_t s = 0; s < layer.sequences(); ++s) {
    bool undecided = false;
    for (index_t h = 0; h < layer.kv_heads(); ++h) undecided |= kept.counts(s, h).undecided;
    for (index_t h = 0; h < layer.kv_heads() && undecided; ++h) {
      keep_all(kept, s, h, layer.tokens(s), true);
    }
  }
}

template <class Executor, class Layer>
void top_mass(const Executor& threads, double share, bool sink_start, const Layer& layer,
              const scores_view<>& scores, const kept_positions<>& kept,
              const selection_scratch& scratch) noexcept {
  const index_t group = layer.q_heads() / layer.kv_heads();
  for_each_head(threads, layer.shape(), 8 * group, [&](int worker, index_t s, index_t h) {
    const index_t tokens = layer.tokens(s);
    float* values = scratch.values_of(worker);
    std::uint8_t* marks = scratch.marks_of(worker);
    std::fill_n(marks, tokens, std::uint8_t{0});
    for (index_t g = 0; g < group && tokens > 0; ++g) {
      const float* row = scores.at(s, h * group + g);
      const index_t stride = scores.stride(2);
      double sum = 0;
      for (index_t t = 0; t < tokens; ++t) sum += static_cast<double>(row[t * stride]);
      if (!norm_scan::decidable(sum)) return keep_all(kept, s, h, tokens, true);
      const auto part = static_cast<float>(1 / sum);
      const auto value = [&](index_t t) {
        return sink_start ? row[t * stride] * part : row[t * stride];
      };
      for (index_t t = 0; t < tokens; ++t) values[t] = value(t);
      value_limit limit = sink_start ? limit_of_bisection(values, tokens, static_cast<float>(share))
                                     : limit_by_mass(values, tokens, share * sum);
      for (index_t t = 0; t < tokens; ++t) {
        if (limit.selects(value(t))) marks[t] = 1;
      }
    }
    position_writer writer(kept, s, h);
    for (index_t t = 0; t < tokens; ++t) {
      if (marks[t] != 0) writer.append(t);
    }
    writer.finish(tokens);
  });
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
