// SPDX-License-Identifier: Apache-2.0
// Finds the limits of long rows over a grid. The steps are those of value_limit.hpp, but each step
// is a launch, and each block works on a part of a row.
//
// A block writes the weight of each bin of its part. In the next launch every block of the row sums
// these weights, finds the same digit, and weighs its part by the next digit.
#pragma once

#include "refreekv/core/workspace.hpp"
#include "refreekv/cuda/grid_keep.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The progress of one limit. Each part of a row has its own copy, which equals all others.
template <class Bins>
struct descent_state {
  Bins bins;
  descent_end<typename Bins::weight> end;  ///< needed is 0 once the limit is known
};

/// A radix descent over rows that are cut in parts.
template <class Bins, class Memory>
struct grid_descent {
  using digits = descent_digits<Bins>;
  using weight = typename Bins::weight;
  using memory = limit_memory<Bins>;

  cut_rows<Memory> rows;
  descent_state<Bins>* states;  ///< [row, part]
  weight* weights;              ///< [2, row, part, bin]: of the last two digits, alternating
  double* sums;                 ///< [row, tile]: sums of the values; for mass_bins only
  index_t joined;               ///< neighbouring rows that share a limit; 1 if each row has its own

  /// Carves the buffers. scores: [sequence, head, capacity]
  [[nodiscard]] static grid_descent carve(arena& from, const scores_view<Memory>& scores,
                                          const row_cut& cut, index_t joined = 1) noexcept {
    const index_t count = scores.extent(0) * scores.extent(1);
    grid_descent d{};
    d.rows = {scores, cut, from.array<row_tokens>(count), from.array<value_limit>(count, cut.parts),
              from.array<position_t>(count, cut.parts)};
    d.states = from.array<descent_state<Bins>>(count, cut.parts);
    d.weights = from.array<weight>(2, count, cut.parts, digits::bins);
    if constexpr (std::is_same_v<Bins, mass_bins>) {
      d.sums = from.array<double>(count, tiles_of(scores.extent(2)));
    }
    d.joined = joined;
    return d;
  }

  /// Returns how many parts of a row are weighed: the first ones, which have values. If rows share
  /// a limit, all parts are weighed.
  [[nodiscard]] REFREEKV_DEVICE index_t weighed(index_t count) const noexcept {
    return joined == 1 ? rows.cut.used(count) : rows.cut.parts;
  }

  /// Weighs a part by a digit: writes its state and the weights of its bins. item: [row, part]
  template <thread_block Block>
  REFREEKV_DEVICE void weigh(Block& block, memory& s, index_t item, token_range part,
                             const descent_state<Bins>& state, int digit) const noexcept {
    if (block.rank() == 0) states[item] = state;
    if (state.end.needed == 0) return;
    const value_row row = rows.row(item / rows.cut.parts).from(part.begin);
    const weight own =
        cuda_detail::weigh(block, s, row, part.end - part.begin, state.bins, state.end.bits, digit);
    if (block.rank() % digits::lanes == 0) {
      weights_by(digit, item)[block.rank() / digits::lanes] = own;
    }
  }

  /// Returns `end` with digit `digit` found. Requires that the previous launch weighed the row's
  /// first `used` parts by it.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE descent_end<weight> find_digit(Block& block, memory& s, index_t row,
                                                               index_t used,
                                                               const descent_end<weight>& end,
                                                               int digit) const noexcept {
    constexpr int batch = 8, lanes = digits::lanes;
    const weight* of = weights_by(digit, first_item(row)) + block.rank() / lanes;
    used *= joined;
    weight sum[1] = {};
    for (index_t first = block.rank() % lanes; first < used; first += batch * lanes) {
      REFREEKV_UNROLL
      for (int i = 0; i < batch; ++i) {
        const index_t part = first + i * lanes;
        sum[0] += part < used ? of[part * digits::bins] : 0;
      }
    }
    const weight all = block.template tile_reduce_scatter<lanes>(sum, plus{});
    return descended(block, s, end, block.rank() % lanes == 0 ? all : 0, digit);
  }

  /// Returns the limit of a part's values. Requires that all digits but the last are found.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE value_limit limit(Block& block, memory& s, index_t row,
                                                  index_t index, index_t count,
                                                  const descent_state<Bins>& state) const noexcept {
    constexpr int last = digits::count - 1;
    const auto end = find_digit(block, s, row, weighed(count), state.end, last);
    const float least = from_ordered_bits(end.bits);
    const weight* of = weights_by(last, first_item(row)) + end.bits % digits::bins;
    const auto equals = [&](index_t i) {
      return state.bins.values_of(of[i * digits::bins], least);
    };
    const index_t item = row * rows.cut.parts + index - first_item(row);
    index_t own = 0;
    for (index_t i = block.rank(); i < item; i += block_threads) own += equals(i);
    const auto before = block_reduce(block, s.counts, static_cast<std::uint64_t>(own), plus{});
    const token_range part = rows.cut.part(index, count);
    return limit_at(block, s, rows.row(row).from(part.begin), part.begin, part.end - part.begin,
                    least, state.bins.values_for(end.needed, least) - static_cast<index_t>(before),
                    equals(item));
  }

 private:
  /// Returns the first part of the rows that share a row's limit.
  [[nodiscard]] REFREEKV_DEVICE index_t first_item(index_t row) const noexcept {
    return row / joined * joined * rows.cut.parts;
  }
  /// Returns the weights [bin] of a part. item: [row, part]
  [[nodiscard]] REFREEKV_DEVICE weight* weights_by(int digit, index_t item) const noexcept {
    const index_t items = rows.scores.extent(0) * rows.scores.extent(1) * rows.cut.parts;
    return weights + (digit % 2 * items + item) * digits::bins;
  }
};

/// Finds a digit from the previous launch, and weighs each part by the next digit.
template <class Bins, class Memory>
struct weigh_parts_body {
  using shared = limit_memory<Bins>;
  grid_descent<Bins, Memory> descent;
  int digit;

  /// item: [row, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const row_cut& cut = descent.rows.cut;
    const index_t row = item / cut.parts, part = item % cut.parts;
    const index_t count = descent.rows.tokens[row].candidates, used = descent.weighed(count);
    if (part >= used) return;
    auto state = descent.states[item];
    if (state.end.needed == 0) return;
    state.end = descent.find_digit(block, s, row, used, state.end, digit - 1);
    descent.weigh(block, s, item, cut.part(part, count), state, digit);
  }
};

/// Finds the last digit and each part's limit. Also counts what the part keeps, if each KV head has
/// one row (group 1).
template <class Bins, class Memory>
struct part_limits_body {
  using shared = limit_memory<Bins>;
  grid_descent<Bins, Memory> descent;
  grid_keep<Memory> keep;

  /// item: [row, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const row_cut& cut = descent.rows.cut;
    const index_t row = item / cut.parts, part = item % cut.parts;
    const index_t count = descent.rows.tokens[row].candidates;
    if (part >= cut.used(count)) return;
    const auto state = descent.states[item];
    if (state.end.needed != 0) {
      const value_limit limit = descent.limit(block, s, row, part, count, state);
      if (block.rank() == 0) descent.rows.limits[item] = limit;
      block.sync();
    }
    if (keep.group == 1) keep.count(block, s.counts, item);
  }
};

/// Finds the limits of rows. Requires that a launch has weighed them by the first digit.
template <class Backend, class Bins, class Memory>
[[nodiscard]] status find_on_grid(const Backend& exec, const grid_descent<Bins, Memory>& descent,
                                  const grid_keep<Memory>& keep) noexcept {
  const index_t items = descent.rows.items();
  status s = status::ok;
  for (int digit = 1; s == status::ok && digit < descent_digits<Bins>::count; ++digit) {
    s = run_blocks(exec, items, weigh_parts_body<Bins, Memory>{descent, digit});
  }
  if (s != status::ok) return s;
  return run_blocks(exec, items, part_limits_body<Bins, Memory>{descent, keep});
}

/// Keeps what each group of rows selects. Requires that a launch has weighed the rows by the first
/// digit.
template <class Backend, class Bins, class Memory>
[[nodiscard]] status keep_on_grid(const Backend& exec, const grid_descent<Bins, Memory>& descent,
                                  index_t group, const kept_positions<Memory>& kept) noexcept {
  const grid_keep<Memory> keep{descent.rows, group, kept};
  status s = find_on_grid(exec, descent, keep);
  if (s == status::ok && group > 1) {
    s = run_blocks(exec, keep.items(), grid_keep_body<keep_step::count, Memory>{keep});
  }
  return s == status::ok
             ? run_blocks(exec, keep.items(), grid_keep_body<keep_step::write, Memory>{keep})
             : s;
}

}  // namespace refreekv::inline v0::cuda_detail
