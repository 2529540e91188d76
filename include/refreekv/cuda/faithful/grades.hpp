// SPDX-License-Identifier: Apache-2.0
// Sizes of a layer's cache on a device: the tokens that each size keeps, and the share of the
// scores that it drops.
#pragma once

#include "refreekv/cuda/faithful/grade_limits.hpp"
#include "refreekv/cuda/keep.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Writes the grade of each token, a thread per token, and the sum of each grade's scores in each
/// chunk. Equal scores with different grades get grade 0 here and no sum; lost_body adds them.
template <class Layer>
struct grade_body {
  struct shared {
    score_limits limits;
    double sums[block_warps][max_sizes];
  };
  rankings<Layer> of;
  scores_view<typename Layer::memory> scores;
  view<grade, 3, typename Layer::memory> grades;
  const score_limits* limits;
  index_t chunks;
  double* sums;   ///< [sequence, kv_head, chunk, sizes]
  row_parts cut;  ///< of each KV head's chunks

  /// item: [sequence, part, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const part_place place = part_place::of_interleaved(item, of.layer.kv_heads(), cut.parts);
    const score_limits& own = limits[of.together() ? place.sequence : place.row];
    const int count = own.count;
    if (block.rank() < count) s.limits.of[block.rank()] = own.of[block.rank()];
    block.sync();
    const bool decides = count > 0;
    const query_window window = of.window(place.sequence);
    const token_range candidates = of.rule.candidates(window);
    const index_t unseen = importance_rule::seen_by(window).begin;
    for_each_chunk(of.layer, place, 0, cut.parts, [&](index_t chunk, token_range tokens) {
      const index_t token = tokens.begin + block.rank();
      const bool is_candidate =
          decides && token < tokens.end && token >= candidates.begin && token < candidates.end;
      grade g = 0;
      if (is_candidate) {
        g = grade_of(s, count, scores(place.sequence, place.head, token));
      } else if (decides && token >= of.rule.sinks && token < unseen) {
        g = grade_never;
      }
      if (token < tokens.end) grades(place.sequence, place.head, token) = g;
      sum(block, s, is_candidate ? g : 0,
          is_candidate ? scores(place.sequence, place.head, token) : 0.0f,
          sums + (place.row * chunks + chunk) * of.rule.sizes);
    });
  }

 private:
  [[nodiscard]] REFREEKV_DEVICE grade grade_of(const shared& s, int count,
                                               float score) const noexcept {
    int low = 0, high = count - 1;  // the first limit <= score; the last limit always is
    while (low < high) {
      const int middle = (low + high) / 2;
      if (s.limits.of[middle].value > score) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const score_limit& limit = s.limits.of[low];
    return limit.value < score ? limit.first : limit.of_equals;
  }

  /// Writes the sum of each grade's scores. Each warp adds in the order of its tokens.
  template <thread_block Block>
  REFREEKV_DEVICE void sum(Block& block, shared& s, int own, float score,
                           double* to) const noexcept {
    static_assert(max_sizes <= 2 * warp_threads);
    const int lane = lane_of(block), warp = warp_of(block);
    double low = 0, high = 0;  // sums of the grades lane + 1 and lane + 33
    if (block.warp_reduce(own, larger{}) > 0) {
      REFREEKV_NO_UNROLL
      for (int i = 0; i < warp_threads; ++i) {
        const int g = block.warp_broadcast(own, i) - 1 - lane;
        const double x = block.warp_broadcast(score, i);
        if (g == 0) low += x;
        if (g == warp_threads) high += x;
      }
    }
    s.sums[warp][lane] = low;
    s.sums[warp][lane + warp_threads] = high;
    block.sync();
    if (block.rank() < narrow(of.rule.sizes)) {
      double all = 0;
      for (int w = 0; w < block_warps; ++w) all += s.sums[w][block.rank()];
      to[block.rank()] = all;
    }
    block.sync();
  }
};

/// Grades the equal scores that grade_body skipped, in the order of the ranking. Writes lost
/// [sequence, sizes + 1]: the share of the candidates' scores that each size drops. An undecided
/// head makes its whole sequence undecided.
template <class Layer>
struct lost_body {
  struct shared {
    warp_values<std::uint64_t> counts;
    double sums[block_threads];  ///< [part, sizes]: each part sums every parts-th chunk
  };
  rankings<Layer> of;
  scores_view<typename Layer::memory> scores;
  view<grade, 3, typename Layer::memory> grades;
  const score_limits* limits;
  index_t chunks;
  const double* sums;  ///< [sequence, kv_head, chunk, sizes]
  double* lost;

  /// item: sequence
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t sequence) const noexcept {
    const index_t kv_heads = of.layer.kv_heads(), sizes = of.rule.sizes;
    const bool decided = of.decided(block, sequence);
    for (index_t h = block.rank(); h < kv_heads && !decided; h += block_threads) {
      of.counts(sequence, h).undecided = true;
    }
    double* const to = lost + sequence * (sizes + 1);
    const score_limits* const own = limits + sequence * of.count();
    if (!decided || own[0].count == 0) {
      for (index_t i = block.rank(); i <= sizes; i += block_threads) to[i] = 0;
      return;
    }
    for (index_t r = 0; r < of.count(); ++r) {
      const ranked_heads heads = of.heads(sequence, r);
      for (int i = 0; i < own[r].count; ++i) {
        if (own[r].of[i].of_equals == 0) grade_equals(block, s, sequence, heads, own[r], i);
      }
    }
    const index_t parts = block_threads / sizes, size = block.rank() % sizes;
    const index_t part = block.rank() / sizes;
    double sum = 0;
    const index_t count = chunking{of.layer.tokens(sequence), 0}.count();
    for (index_t h = 0; h < kv_heads; ++h) {
      const double* const head = sums + (sequence * kv_heads + h) * chunks * sizes + size;
      for (index_t c = part; c < count; c += parts) sum += head[c * sizes];
    }
    for (index_t r = part; r < of.count(); r += parts) sum += sum_of_equals(own[r], size + 1);
    s.sums[block.rank()] = sum;
    block.sync();
    if (block.rank() != 0) return;
    // Suffix sums: size i drops all grades above i.
    double total = 0;
    to[sizes] = 0;
    for (index_t i = sizes; i > 0; --i) {
      for (index_t p = 0; p < parts; ++p) total += s.sums[p * sizes + i - 1];
      to[i - 1] = total;
    }
    for (index_t i = 0; i <= sizes; ++i) to[i] /= total;
  }

 private:
  template <thread_block Block>
  REFREEKV_DEVICE void grade_equals(Block& block, shared& s, index_t sequence,
                                    const ranked_heads& heads, const score_limits& all,
                                    int which) const noexcept {
    const score_limit& limit = all.of[which];
    index_t before = limit.rank;
    for (index_t h = heads.first; h < heads.first + heads.count; ++h) {
      const value_row row{scores.at(sequence, h, heads.tokens.begin), scores.stride(2)};
      before += for_each_selected(
          block, s.counts, heads.tokens.end - heads.tokens.begin,
          [&](index_t t) { return row(t) == limit.value; },
          [&](index_t i, index_t t) {
            grades(sequence, h, heads.tokens.begin + t) =
                grade_of_equal(of.rule, limit, all.candidates, before + i);
          });
    }
  }

  /// Returns the sum of the scores of grade g among the equal scores that grade_body skipped.
  [[nodiscard]] REFREEKV_DEVICE double sum_of_equals(const score_limits& all,
                                                     index_t g) const noexcept {
    double sum = 0;
    for (int i = 0; i < all.count; ++i) {
      const score_limit& limit = all.of[i];
      if (limit.of_equals != 0 || g < limit.first || g > index_t{limit.last} + 1) continue;
      const index_t from = of.rule.kept_by(g - 1, all.candidates);
      const index_t to = of.rule.kept_by(g, all.candidates);
      const index_t end = limit.rank + limit.equals;
      const index_t first = from > limit.rank ? from : limit.rank, last = to < end ? to : end;
      if (last > first) sum += double{limit.value} * static_cast<double>(last - first);
    }
    return sum;
  }
};

/// The primitive `grade_tokens`: see `ops`.
template <class Backend, class Valued>
[[nodiscard]] status grade_tokens(const Backend& exec, importance_rule rule, const Valued& valued,
                                  const scores_view<typename Valued::memory>& scores,
                                  const view<grade, 3, typename Valued::memory>& grades,
                                  double* lost,
                                  const view<kept_tokens, 2, typename Valued::memory>& counts,
                                  const importance_scratch& scratch) noexcept {
  const auto& layer = detail::plain(valued);
  using layer_type = std::remove_cvref_t<decltype(layer)>;
  rule.rows = scratch.rows;
  arena memory = scratch.carve();
  double* const sums = scratch.carve_grade_sums(memory, rule, layer);
  const rankings<layer_type> of{rule, layer, counts};
  status s = find_limits(exec, of, scores, scratch);
  if (s != status::ok) return s;
  const row_parts cut = row_parts::of(kv_head_items(layer), scratch.chunks);
  const grade_body<layer_type> grade_all{of,   scores, grades, scratch.limits, scratch.chunks,
                                         sums, cut};
  s = run_blocks(exec, cut.items(), grade_all);
  if (s != status::ok) return s;
  const lost_body<layer_type> sum{of, scores, grades, scratch.limits, scratch.chunks, sums, lost};
  return run_blocks(exec, layer.sequences(), sum);
}

/// Keeps the tokens whose grade is at most their sequence's size. Writes `kept`.
template <class Layer>
struct keep_grades_body {
  using memory = typename Layer::memory;
  using shared = warp_values<std::uint64_t>;
  Layer layer;
  view<const grade, 3, memory> grades;
  const position_t* sizes;
  kept_positions<memory> kept;

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const head_place place = head_place::of(item, layer.kv_heads());
    const index_t tokens = layer.tokens(place.sequence);
    const position_t size = sizes[place.sequence];
    const auto stays = [&](index_t t) { return grades(place.sequence, place.head, t) <= size; };
    const index_t held =
        write_where(block, s, kept, place.sequence, place.head, {0, tokens}, 0, stays);
    if (block.rank() != 0) return;
    kept_tokens& count = kept.counts(place.sequence, place.head);
    count = {static_cast<position_t>(held), static_cast<position_t>(tokens), count.undecided};
  }
};

/// The primitive `keep_grades`: see `ops`.
template <class Backend, class Valued>
[[nodiscard]] status keep_grades(const Backend& exec, const Valued& valued,
                                 const view<const grade, 3, typename Valued::memory>& grades,
                                 const position_t* sizes,
                                 const kept_positions<typename Valued::memory>& kept) noexcept {
  const auto& layer = detail::plain(valued);
  const keep_grades_body<std::remove_cvref_t<decltype(layer)>> body{layer, grades, sizes, kept};
  return run_blocks(exec, kv_head_items(layer), body);
}

}  // namespace refreekv::inline v0::cuda_detail
