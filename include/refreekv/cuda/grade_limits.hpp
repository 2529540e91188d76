// SPDX-License-Identifier: Apache-2.0
// Where the sizes of a ranking end, on a device: the scores at their last places.
#pragma once

#include "refreekv/cuda/importance_scratch.hpp"
#include "refreekv/cuda/value_row.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The heads [first, first + count) whose candidates [begin, end) are ranked together, in the order
/// that decides between equals.
struct ranked_heads {
  index_t first, count;
  token_range tokens;

  [[nodiscard]] REFREEKV_DEVICE index_t candidates() const noexcept {
    return count * (tokens.end - tokens.begin);
  }
};

/// How the KV heads of a sequence are ranked.
template <class Seen>
struct rankings {
  importance_rule rule;
  Seen seen;
  view<kept_count, 2, typename Seen::memory> counts;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool together() const noexcept {
    return rule.scope == cut_scope::kv_head;
  }
  /// Of each sequence.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t count() const noexcept {
    return together() ? 1 : seen.kv_heads();
  }
  [[nodiscard]] REFREEKV_DEVICE query_window window(index_t sequence) const noexcept {
    return window_of(seen, sequence, rule.rows);
  }
  [[nodiscard]] REFREEKV_DEVICE ranked_heads heads(index_t sequence,
                                                   index_t ranking) const noexcept {
    const token_range candidates = rule.candidates(window(sequence));
    if (together()) return {0, seen.kv_heads(), candidates};
    return {ranking, 1, candidates};
  }
  /// Whether all heads of a sequence are decided.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE bool decided(Block& block, index_t sequence) const noexcept {
    bool decided = true;
    for (index_t h = block.rank(); h < seen.kv_heads(); h += block_threads) {
      decided = decided && !counts(sequence, h).undecided;
    }
    return block.sync_and(decided);
  }
};

/// The grade of the n-th of a ranking, from 0, which is among those that equal a limit.
[[nodiscard]] REFREEKV_DEVICE grade grade_of_equal(const importance_rule& rule,
                                                   const score_limit& limit, index_t candidates,
                                                   index_t n) noexcept {
  int g = limit.first;
  while (g < limit.last && n >= rule.kept_by(g, candidates)) ++g;
  // The last ones may be beyond all sizes that end among them.
  return static_cast<grade>(n < rule.kept_by(g, candidates) ? g : g + 1);
}

/// Finds the limits of each ranking, a few bits of the scores at a time. Those are >= 0, whose bits
/// are in their order.
template <class Seen>
struct find_limits_body {
  static constexpr int digit_bits = 7;
  static constexpr int bins = 1 << digit_bits;
  static constexpr int last_bits = 31 % digit_bits;  // of the last digit: there is no sign

  struct shared {
    /// [group, digit]: of the values that begin as those of a group do, how many have it next.
    unsigned counts[max_sizes][bins];
    /// What groups begin with, from large to small.
    std::uint32_t groups[max_sizes];
    int group_count;
    // Of the size i + 1: the group that its last place is in, what comes before that place in the
    // group, and, in the end, its equals.
    int group[max_sizes];
    std::uint32_t prefix[max_sizes];
    index_t left[max_sizes];
    unsigned equals[max_sizes];
  };

  rankings<Seen> of;
  scores_view<typename Seen::memory> scores;
  score_limits* limits;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return of.seen.sequences() * of.count();
  }

  /// item: [sequence, ranking]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t sequence = item / of.count();
    const ranked_heads heads = of.heads(sequence, item % of.count());
    const index_t candidates = heads.candidates();
    score_limits& to = limits[item];
    if (!of.decided(block, sequence) || candidates == 0) {
      if (block.rank() == 0) to.count = 0;
      return;
    }
    const int i = block.rank();
    if (i < narrow(of.rule.sizes)) {
      s.left[i] = of.rule.kept_by(i + 1, candidates) - 1;
      s.prefix[i] = 0;
      s.group[i] = 0;
    }
    if (i == 0) {
      s.groups[0] = 0;
      s.group_count = 1;
    }
    for (int shift = 31 - digit_bits; shift > -digit_bits; shift -= digit_bits) {
      descend(block, s, sequence, heads, shift < 0 ? 0 : shift, shift < 0 ? last_bits : digit_bits);
    }
    if (block.rank() == 0) write(s, candidates, to);
  }

 private:
  template <thread_block Block>
  REFREEKV_DEVICE void descend(Block& block, shared& s, index_t sequence, const ranked_heads& heads,
                               int shift, int bits) const noexcept {
    for (int b = block.rank(); b < narrow(max_sizes) * bins; b += block_threads) {
      s.counts[b / bins][b % bins] = 0;
    }
    block.sync();
    const int groups = s.group_count;
    const std::uint32_t mask = (1u << bits) - 1;
    for (index_t h = heads.first; h < heads.first + heads.count; ++h) {
      const value_row row{scores.at(sequence, h, heads.tokens.begin), scores.stride(2)};
      for_each_value(block, row, heads.tokens.end - heads.tokens.begin, [&](float v) {
        const std::uint32_t value = as_bits(v), begins = value >> shift >> bits;
        int low = 0, high = groups - 1;  // the first group that is not larger
        while (low < high) {
          const int middle = (low + high) / 2;
          if (s.groups[middle] > begins) {
            low = middle + 1;
          } else {
            high = middle;
          }
        }
        if (s.groups[low] == begins) block.add(s.counts[low][value >> shift & mask], 1u);
      });
    }
    block.sync();
    if (block.rank() < narrow(of.rule.sizes)) {
      const int i = block.rank();
      const unsigned* const count = s.counts[s.group[i]];
      int digit = (1 << bits) - 1;
      index_t left = s.left[i];
      while (digit > 0 && left >= index_t{count[digit]}) left -= index_t{count[digit--]};
      s.left[i] = left;
      s.equals[i] = count[digit];
      s.prefix[i] = s.prefix[i] << bits | static_cast<std::uint32_t>(digit);
    }
    block.sync();
    if (block.rank() == 0) {
      int count = 0;
      for (int i = 0; i < narrow(of.rule.sizes); ++i) {
        if (count == 0 || s.groups[count - 1] != s.prefix[i]) s.groups[count++] = s.prefix[i];
        s.group[i] = count - 1;
      }
      s.group_count = count;
    }
    block.sync();
  }

  /// Makes one limit of all sizes that end with equals.
  REFREEKV_DEVICE void write(const shared& s, index_t candidates, score_limits& to) const noexcept {
    const importance_rule& rule = of.rule;
    const int sizes = narrow(rule.sizes);
    to.candidates = candidates;
    to.count = s.group_count;
    for (int i = 0; i < sizes;) {
      score_limit& limit = to.of[s.group[i]];
      limit.value = as_float(s.prefix[i]);
      limit.rank = rule.kept_by(i + 1, candidates) - 1 - s.left[i];
      limit.equals = index_t{s.equals[i]};
      limit.first = static_cast<grade>(i + 1);
      const int group = s.group[i];
      while (i < sizes && s.group[i] == group) ++i;
      limit.last = static_cast<grade>(i);
      const grade of_first = grade_of_equal(rule, limit, candidates, limit.rank);
      const grade of_last = grade_of_equal(rule, limit, candidates, limit.rank + limit.equals - 1);
      limit.of_equals = of_first == of_last ? of_first : grade{0};
    }
  }
};

}  // namespace refreekv::inline v0::cuda_detail
