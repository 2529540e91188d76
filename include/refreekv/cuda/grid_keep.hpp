// SPDX-License-Identifier: Apache-2.0
// Keeps the tokens that limits select, in rows that are cut in parts with a block each. One launch
// counts what each part keeps; the next launch writes it, after what the parts before it keep.
#pragma once

#include "refreekv/backend/token_scores.hpp"
#include "refreekv/cuda/block/row_parts.hpp"
#include "refreekv/cuda/block/value_limit.hpp"
#include "refreekv/cuda/keep.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Token counts of one score row.
struct row_tokens {
  index_t candidates;  ///< the first tokens, from which a limit selects
  index_t all;
};

/// Score rows that are cut in parts, and what one launch passes to the next. No block reads what
/// another block writes in the same launch.
template <class Memory>
struct cut_rows {
  scores_view<Memory> scores;  ///< [sequence, head, token]: each head is a row
  row_cut cut;
  row_tokens* tokens;   ///< [row]
  value_limit* limits;  ///< [row, part]: limit of the part's values
  position_t* counts;   ///< [kept row, part]: number of kept candidates; -1 if undecided

  [[nodiscard]] constexpr index_t items() const noexcept {
    return scores.extent(0) * scores.extent(1) * cut.parts;
  }
  [[nodiscard]] REFREEKV_DEVICE value_row row(index_t i) const noexcept {
    return {scores.at(i / scores.extent(1), i % scores.extent(1)), scores.stride(2)};
  }
};

/// What each KV head keeps: the candidates that any row of its group selects, and all tokens after
/// the candidates.
template <class Memory>
struct grid_keep {
  cut_rows<Memory> rows;
  index_t group;
  kept_positions<Memory> kept;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return kept.counts.extent(0) * kept.counts.extent(1) * rows.cut.parts;
  }

  /// Counts what a part keeps; -1 if it is undecided or has NaN. item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void count(Block& block, warp_values<std::uint64_t>& shared,
                             index_t item) const noexcept {
    constexpr int batch = 8;  // as in for_each_value
    const index_t parts = rows.cut.parts, row = item / parts * group, part = item % parts;
    const index_t candidates = rows.tokens[row].candidates;
    if (part >= rows.cut.used(candidates)) return;
    const token_range range = rows.cut.part(part, candidates);
    const limit_union all = limits_of(row, part);
    bool decided = !all.is_undecided();
    std::uint64_t held = 0;
    for (index_t t = range.begin + block.rank(); t < range.end; t += batch * block_threads) {
      std::uint32_t taken = 0;
      for (index_t g = 0; g < group; ++g) {
        const value_row scores = all.row(g);
        const value_limit limit = all.limit(g);
        REFREEKV_UNROLL
        for (int i = 0; i < batch; ++i) {
          const index_t at = t + i * block_threads;
          const float score = at < range.end ? scores(at) : -infinity;
          decided = decided && score == score;
          if (at < range.end && limit.selects(score, at)) taken |= 1u << i;
        }
      }
      REFREEKV_UNROLL
      for (int i = 0; i < batch; ++i) held += taken >> i & 1;
    }
    held = block_reduce(block, shared, held, plus{});
    decided = block.sync_and(decided);
    if (block.rank() == 0) rows.counts[item] = decided ? static_cast<position_t>(held) : -1;
  }

  /// Writes what a part keeps. item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void write(Block& block, warp_values<std::uint64_t>& shared,
                             index_t item) const noexcept {
    const index_t parts = rows.cut.parts, head = item / parts, part = item % parts;
    const index_t sequence = head / kept.counts.extent(1), kv_head = head % kept.counts.extent(1);
    const row_tokens tokens = rows.tokens[head * group];
    const index_t used = rows.cut.used(tokens.candidates);
    const index_t count = block.rank() < used ? rows.counts[head * parts + block.rank()] : 0;
    const bool decided = block.sync_and(count >= 0);
    index_t held = 0;
    if (decided) {
      const auto sum = [&](bool counts) {
        return static_cast<index_t>(
            block_reduce(block, shared, counts ? static_cast<std::uint64_t>(count) : 0, plus{}));
      };
      const index_t before = sum(block.rank() < part);
      held = sum(true);
      const limit_union all = limits_of(head * group, part);
      write_where(block, shared, kept, sequence, kv_head, rows.cut.part(part, tokens.candidates),
                  before, [&](index_t t) { return all.selects(t); });
    }
    const index_t candidates = decided ? tokens.candidates : 0;
    write_all(block, kept, sequence, kv_head, {candidates, tokens.all}, held, part, parts);
    if (part == 0 && block.rank() == 0) {
      kept.counts(sequence, kv_head) = {static_cast<position_t>(held + tokens.all - candidates),
                                        static_cast<position_t>(tokens.all), !decided};
    }
  }

 private:
  /// Returns the union of the limits of one part of `group` rows, from `row` on.
  [[nodiscard]] REFREEKV_DEVICE limit_union limits_of(index_t row, index_t part) const noexcept {
    const index_t parts = rows.cut.parts;
    return {rows.row(row), rows.scores.stride(1), rows.limits + row * parts + part, parts, group};
  }
};

/// The two launches of grid_keep.
enum class keep_step { count, write };

template <keep_step Step, class Memory>
struct grid_keep_body {
  using shared = warp_values<std::uint64_t>;
  grid_keep<Memory> keep;

  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    if constexpr (Step == keep_step::count) {
      keep.count(block, s, item);
    } else {
      keep.write(block, s, item);
    }
  }
};

}  // namespace refreekv::inline v0::cuda_detail
