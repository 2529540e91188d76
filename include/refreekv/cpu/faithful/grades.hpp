// SPDX-License-Identifier: Apache-2.0
// Cache sizes of a layer on the CPU: the tokens that each size keeps, and the share of the scores
// that it drops. Tokens are ranked over all KV heads or within each, depending on the scope.
#pragma once

#include "refreekv/cpu/faithful/importance.hpp"
#include "refreekv/cpu/top_tokens.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Partially sorts values [begin, end) from large to small: the elements at place(i), for i in
/// [first, last), are where a full sort would put them. Requires ascending place(i). O(count *
/// log(last - first)) expected.
template <class Place>
void select_places(float* values, index_t begin, index_t end, index_t first, index_t last,
                   const Place& place) noexcept {
  while (first < last) {
    const index_t middle = first + (last - first) / 2, at = place(middle);
    std::nth_element(values + begin, values + at, values + end,
                     [](float a, float b) { return a > b; });
    select_places(values, begin, at, first, middle, place);
    begin = at + 1;
    first = middle + 1;
    while (first < last && place(first) == at) ++first;
  }
}

/// Grades the candidates of one ranking. Requires a call of `next` for each candidate, in the order
/// that decides between equals.
class grader {
 public:
  /// values [count]: the scores of all candidates. Reorders them.
  grader(const importance_rule& rule, float* values, index_t count) noexcept : rule_(rule) {
    const auto place = [&](index_t i) { return rule.kept_by(i + 1, count) - 1; };
    select_places(values, 0, count, 0, rule.sizes, place);
    index_t before = 0;  // candidates up to the place of the previous size
    for (index_t i = 0; i < rule.sizes; ++i) {
      const index_t end = place(i) + 1;
      const float value = values[end - 1];
      if (limits_ == 0 || value < limit_[limits_ - 1].value) {
        const index_t above =
            std::count_if(values + before, values + end, [&](float v) { return v > value; });
        limit_[limits_++] = {value, static_cast<grade>(i + 1), 0, before + above};
      }
      limit_[limits_ - 1].last = static_cast<grade>(i + 1);
      before = end;
    }
    count_ = count;
  }

  grade next(float value) noexcept {
    limit* const end = limit_ + limits_;
    limit* const at =
        std::lower_bound(limit_, end, value, [](const limit& l, float v) { return l.value > v; });
    if (at == end) return static_cast<grade>(rule_.sizes);
    if (at->value < value) return at->first;
    const index_t rank = at->rank++;
    grade g = at->first;
    while (g < at->last && rank >= rule_.kept_by(g, count_)) ++g;
    // The last of several equals may be beyond all sizes that end among them.
    return rank < rule_.kept_by(g, count_) ? g : static_cast<grade>(g + 1);
  }

 private:
  struct limit {
    float value;  ///< the smallest value that sizes [first, last] keep
    grade first, last;
    index_t rank;  ///< rank of the next candidate that equals it
  };

  const importance_rule& rule_;
  index_t count_ = 0, limits_ = 0;
  limit limit_[max_sizes];
};

/// Grades the tokens of one sequence. Writes to lost [sizes + 1] the share of the candidates'
/// scores that each size drops; NaN if all scores are 0.
template <class Layer>
void grade_sequence(const importance_rule& rule, const Layer& layer, index_t s,
                    const scores_view<>& scores, const view<grade, 3>& grades, double* lost,
                    const view<kept_tokens, 2>& counts, float* sorted) noexcept {
  const query_window window = window_of(detail::plain(layer), s, rule.rows);
  const auto [begin, end] = rule.candidates(window);
  const index_t kv_heads = layer.kv_heads(), tokens = window.tokens,
                unseen = importance_rule::seen_by(window).begin;
  bool undecided = false;
  for (index_t h = 0; h < kv_heads; ++h) undecided |= counts(s, h).undecided;
  const bool none = undecided || begin == end;
  for (index_t h = 0; h < kv_heads; ++h) {
    counts(s, h).undecided = undecided;
    grade* own = grades.at(s, h);
    std::fill_n(own, tokens, grade{0});
    if (!none && unseen > rule.sinks) std::fill(own + rule.sinks, own + unseen, grade_never);
  }
  std::fill_n(lost, rule.sizes + 1, 0.0);
  if (none) return;

  const index_t together = rule.scope == cut_scope::kv_head ? kv_heads : 1;  // heads in a ranking
  for (index_t head = 0; head < kv_heads; head += together) {
    const index_t count = (end - begin) * together;
    for (index_t h = 0; h < together; ++h) {
      for (index_t t = begin; t < end; ++t) {
        sorted[h * (end - begin) + t - begin] = scores(s, head + h, t);
      }
    }
    grader rank(rule, sorted, count);
    for (index_t h = head; h < head + together; ++h) {
      double sums[max_sizes + 1] = {};  // in the order of heads and positions
      for (index_t t = begin; t < end; ++t) {
        const float score = scores(s, h, t);
        const grade g = rank.next(score);
        grades(s, h, t) = g;
        sums[g] += static_cast<double>(score);
      }
      for (index_t g = 0; g <= rule.sizes; ++g) lost[g] += sums[g];
    }
  }
  // Converts the sum of each grade to the sum of all larger grades.
  double total = 0;
  for (index_t g = rule.sizes; g >= 0; --g) {
    const double own = lost[g];
    lost[g] = total;
    total += own;
  }
  for (index_t g = 0; g <= rule.sizes; ++g) lost[g] /= total;
}

template <class Executor, class Layer>
void grade_tokens(const Executor& threads, const importance_rule& rule, const Layer& layer,
                  const scores_view<>& scores, const view<grade, 3>& grades, double* lost,
                  const view<kept_tokens, 2>& counts, const importance_scratch& scratch) noexcept {
  const index_t elements = layer.sequences() * layer.kv_heads() * layer.capacity();
  auto* sorted = static_cast<float*>(static_cast<void*>(scratch.memory));
  for_each_item(threads, layer.sequences(), elements * 32, [&](int, index_t s) {
    grade_sequence(rule, layer, s, scores, grades, lost + s * (rule.sizes + 1), counts,
                   sorted + s * layer.kv_heads() * layer.capacity());
  });
}

template <class Executor, class Layer>
void keep_grades(const Executor& threads, const Layer& layer, const view<const grade, 3>& grades,
                 const position_t* sizes, const kept_positions<>& kept) noexcept {
  for_each_head(threads, layer.shape(), 4, [&](int, index_t s, index_t h) {
    const index_t tokens = layer.tokens(s);
    const grade* own = grades.at(s, h);
    position_writer writer(kept, s, h);
    for (index_t t = 0; t < tokens; ++t) {
      if (own[t] <= sizes[s]) writer.append(t);
    }
    writer.finish(tokens, kept.counts(s, h).undecided);
  });
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
