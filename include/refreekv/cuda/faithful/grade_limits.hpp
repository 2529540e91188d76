// SPDX-License-Identifier: Apache-2.0
// The limits of a ranking's sizes on a device: the score at the last place of each size.
#pragma once

#include "refreekv/cuda/block/value_row.hpp"
#include "refreekv/cuda/faithful/importance_scratch.hpp"

namespace refreekv::inline v0::cuda_detail {

/// KV heads [first, first + count) whose candidate tokens form one ranking. Equal scores rank by
/// head, then by position.
struct ranked_heads {
  index_t first, count;
  token_range tokens;

  [[nodiscard]] REFREEKV_DEVICE index_t candidates() const noexcept {
    return count * (tokens.end - tokens.begin);
  }
};

/// Which KV heads of a sequence form a ranking: all together, or each alone.
template <class Layer>
struct rankings {
  importance_rule rule;
  Layer layer;
  view<kept_tokens, 2, typename Layer::memory> counts;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool together() const noexcept {
    return rule.scope == cut_scope::kv_head;
  }
  /// Rankings per sequence.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t count() const noexcept {
    return together() ? 1 : layer.kv_heads();
  }
  [[nodiscard]] REFREEKV_DEVICE query_window window(index_t sequence) const noexcept {
    return window_of(layer, sequence, rule.rows);
  }
  [[nodiscard]] REFREEKV_DEVICE ranked_heads heads(index_t sequence,
                                                   index_t ranking) const noexcept {
    const token_range candidates = rule.candidates(window(sequence));
    if (together()) return {0, layer.kv_heads(), candidates};
    return {ranking, 1, candidates};
  }
  /// Whether no KV head of a sequence is undecided.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE bool decided(Block& block, index_t sequence) const noexcept {
    bool decided = true;
    for (index_t h = block.rank(); h < layer.kv_heads(); h += block_threads) {
      decided = decided && !counts(sequence, h).undecided;
    }
    return block.sync_and(decided);
  }
};

/// Returns the grade of place n, from 0, of a ranking. Requires that the score at this place
/// equals the limit.
[[nodiscard]] REFREEKV_DEVICE grade grade_of_equal(const importance_rule& rule,
                                                   const score_limit& limit, index_t candidates,
                                                   index_t n) noexcept {
  int g = limit.first;
  while (g < limit.last && n >= rule.kept_by(g, candidates)) ++g;
  // The last equal scores may lie past every size that ends among them.
  return static_cast<grade>(n < rule.kept_by(g, candidates) ? g : g + 1);
}

/// Initialises the search for each ranking's limits, a thread per size.
template <class Layer>
struct start_search_body {
  struct shared {};
  rankings<Layer> of;
  limit_search* searches;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return of.layer.sequences() * of.count();
  }

  /// item: [sequence, ranking]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t sequence = item / of.count();
    const index_t candidates = of.heads(sequence, item % of.count()).candidates();
    const bool decides = of.decided(block, sequence) && candidates > 0;
    limit_search& to = searches[item];
    const int i = block.rank();
    if (i == 0) to.decides = decides;
    if (i < narrow(of.rule.sizes) && decides) {
      to.begins[0][i] = 0;
      to.left[i] = of.rule.kept_by(i + 1, candidates) - 1;
    }
  }
};

/// Counts the current digit in the scores of each split, separately for each group of limits.
/// Writes limit_parts::counts.
template <class Layer>
struct count_digits_body {
  struct shared {
    unsigned counts[max_sizes * limit_search::bins];
    limit_groups groups;
  };
  rankings<Layer> of;
  scores_view<typename Layer::memory> scores;
  search_digit digit;
  index_t splits;  ///< of the longest sequence
  limit_parts work;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return of.layer.sequences() * of.layer.kv_heads() * splits;
  }

  /// item: [sequence, kv_head, split]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t head = item / splits, begin = item % splits * split_tokens;
    const index_t kv_heads = of.layer.kv_heads(), sequence = head / kv_heads;
    if (begin >= of.layer.tokens(sequence)) return;
    const limit_search& search = work.searches[of.together() ? sequence : head];
    if (!search.decides) return;
    const int groups = s.groups.find(block, search.begins[digit.before()], narrow(of.rule.sizes));
    for (int b = block.rank(); b < groups * limit_search::bins; b += block_threads) s.counts[b] = 0;
    block.sync();
    const token_range all = of.rule.candidates(of.window(sequence));
    const index_t first = begin > all.begin ? begin : all.begin;
    const index_t last = begin + split_tokens < all.end ? begin + split_tokens : all.end;
    const value_row row{scores.at(sequence, head % kv_heads, first), scores.stride(2)};
    for_each_value(block, row, first < last ? last - first : 0, [&](float v) {
      const std::uint32_t value = as_bits(v), begins = value >> digit.shift >> digit.bits;
      int low = 0, high = groups - 1;  // first group whose digits are not larger
      while (low < high) {
        const int middle = (low + high) / 2;
        if (s.groups.begins[middle] > begins) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      if (s.groups.begins[low] != begins) return;
      const std::uint32_t own = value >> digit.shift & ((1u << digit.bits) - 1);
      block.add(s.counts[low * limit_search::bins + static_cast<int>(own)], 1u);
    });
    block.sync();
    unsigned* const to = work.counts + item * of.rule.sizes * limit_search::bins;
    for (int b = block.rank(); b < groups * limit_search::bins; b += block_threads) {
      to[b] = s.counts[b];
    }
  }
};

/// Finds the current digit of each size's limit. One block per group of limits.
template <class Layer>
struct find_digits_body {
  static constexpr int shares = block_threads / limit_search::bins;  // threads per bin
  struct shared {
    index_t counts[shares][limit_search::bins];
    limit_groups groups;
  };
  rankings<Layer> of;
  search_digit digit;
  index_t splits;
  limit_parts work;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return of.layer.sequences() * of.count() * of.rule.sizes;
  }

  /// item: [sequence, ranking, group]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const int group = narrow(item % of.rule.sizes), sizes = narrow(of.rule.sizes);
    const index_t ranking = item / of.rule.sizes, sequence = ranking / of.count();
    limit_search& search = work.searches[ranking];
    if (!search.decides) return;
    if (group >= s.groups.find(block, search.begins[digit.before()], sizes)) return;
    const ranked_heads heads = of.heads(sequence, ranking % of.count());
    const int share = block.rank() / limit_search::bins, bin = block.rank() % limit_search::bins;
    s.counts[share][bin] = sum(sequence, heads, group, bin, share);
    block.sync();
    const int i = block.rank();
    if (i < sizes && s.groups.of[i] == group) find(s, search, i);
  }

 private:
  /// How many scores of a group have the digit `bin`, in one share of the splits.
  [[nodiscard]] REFREEKV_DEVICE index_t sum(index_t sequence, const ranked_heads& heads, int group,
                                            int bin, int share) const noexcept {
    const index_t stride = index_t{of.rule.sizes} * limit_search::bins;
    const index_t used = (of.layer.tokens(sequence) + split_tokens - 1) / split_tokens;
    index_t sum = 0;
    for (index_t h = heads.first; h < heads.first + heads.count; ++h) {
      const unsigned* const own = work.counts +
                                  (sequence * of.layer.kv_heads() + h) * splits * stride +
                                  group * limit_search::bins + bin;
      // Heads start with different shares, because each may have only one split.
      for (index_t i = (share + h) % shares; i < used; i += shares) sum += index_t{own[i * stride]};
    }
    return sum;
  }

  REFREEKV_DEVICE void find(const shared& s, limit_search& search, int i) const noexcept {
    int at = (1 << digit.bits) - 1;
    index_t left = search.left[i];
    const auto count = [&] {
      index_t sum = 0;
      for (int share = 0; share < shares; ++share) sum += s.counts[share][at];
      return sum;
    };
    for (; at > 0 && left >= count(); --at) left -= count();
    search.left[i] = left;
    search.equals[i] = count();
    search.begins[digit.after()][i] =
        search.begins[digit.before()][i] << digit.bits | static_cast<std::uint32_t>(at);
  }
};

/// Writes the limits of each ranking, a thread per limit. Sizes that end at equal scores share one.
template <class Layer>
struct write_limits_body {
  using shared = limit_groups;
  rankings<Layer> of;
  int last;  ///< index into limit_search::begins of the complete scores
  const limit_search* searches;
  score_limits* limits;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return of.layer.sequences() * of.count();
  }

  /// item: [sequence, ranking]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const limit_search& search = searches[item];
    score_limits& to = limits[item];
    if (!search.decides) {
      if (block.rank() == 0) to.count = 0;
      return;
    }
    const importance_rule& rule = of.rule;
    const int sizes = narrow(rule.sizes), count = s.find(block, search.begins[last], sizes);
    const index_t candidates = of.heads(item / of.count(), item % of.count()).candidates();
    if (block.rank() == 0) {
      to.candidates = candidates;
      to.count = count;
    }
    const int i = block.rank();
    if (i >= sizes || (i > 0 && s.of[i - 1] == s.of[i])) return;
    int end = i + 1;
    while (end < sizes && s.of[end] == s.of[i]) ++end;
    score_limit limit{};
    limit.value = as_float(search.begins[last][i]);
    limit.first = static_cast<grade>(i + 1);
    limit.last = static_cast<grade>(end);
    limit.rank = rule.kept_by(i + 1, candidates) - 1 - search.left[i];
    limit.equals = search.equals[i];
    const grade of_first = grade_of_equal(rule, limit, candidates, limit.rank);
    const grade of_last = grade_of_equal(rule, limit, candidates, limit.rank + limit.equals - 1);
    limit.of_equals = of_first == of_last ? of_first : grade{0};
    to.of[s.of[i]] = limit;
  }
};

/// Writes scratch.limits of each ranking. Launches two kernels for each digit of a score, one
/// before and one after them.
template <class Backend, class Layer>
[[nodiscard]] status find_limits(const Backend& exec, const rankings<Layer>& of,
                                 const scores_view<typename Layer::memory>& scores,
                                 const importance_scratch& scratch) noexcept {
  arena memory = scratch.carve();
  const limit_parts work = limit_parts::carve(memory, of.rule, of.layer, scratch.splits);
  const start_search_body<Layer> start{of, work.searches};
  status s = run_blocks(exec, start.items(), start);
  search_digit digit = search_digit::first();
  for (; s == status::ok; digit = digit.next()) {
    const count_digits_body<Layer> count{of, scores, digit, scratch.splits, work};
    s = run_blocks(exec, count.items(), count);
    if (s != status::ok) break;
    const find_digits_body<Layer> find{of, digit, scratch.splits, work};
    s = run_blocks(exec, find.items(), find);
    if (digit.is_last()) break;
  }
  if (s != status::ok) return s;
  const write_limits_body<Layer> write{of, digit.after(), work.searches, scratch.limits};
  return run_blocks(exec, write.items(), write);
}

}  // namespace refreekv::inline v0::cuda_detail
