// SPDX-License-Identifier: Apache-2.0
// Finds where a block stops selecting values of a row: at the k largest, or at a share of the sum.
//
// A radix descent finds the limit in place, digit by digit from the top. Values that share the
// digits found so far are weighed in bins by their next digit. Weights are integers, so sums do not
// depend on their order. A row is read once per digit, without temporary memory. grid_limit.hpp
// does these steps over parts of a row.
#pragma once

#include <cmath>

#include "refreekv/attention/chunk_statistics.hpp"
#include "refreekv/cuda/block/element.hpp"
#include "refreekv/cuda/block/value_row.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Selects values of a row: those above `least`, and equal ones at positions below equals_end.
struct value_limit {
  float least;
  index_t equals_end;  ///< negative: everything is selected, NaN included

  [[nodiscard]] REFREEKV_DEVICE static value_limit everything() noexcept { return {0, -1}; }
  [[nodiscard]] REFREEKV_DEVICE static value_limit nothing() noexcept { return {infinity, 0}; }
  /// Selects everything, because nothing can be decided.
  [[nodiscard]] REFREEKV_DEVICE static value_limit undecided() noexcept {
    return {not_a_number, -1};
  }

  [[nodiscard]] REFREEKV_DEVICE bool selects_everything() const noexcept { return equals_end < 0; }
  [[nodiscard]] REFREEKV_DEVICE bool is_undecided() const noexcept { return least != least; }
  [[nodiscard]] REFREEKV_DEVICE bool selects(float value, index_t t) const noexcept {
    return value > least || (value == least && t < equals_end) || selects_everything();
  }
};

/// The union of what the limits of a group of rows select.
struct limit_union {
  value_row first;
  index_t row_stride;
  const value_limit* limits;  ///< [row], limit_stride apart
  index_t limit_stride;
  index_t rows;

  [[nodiscard]] REFREEKV_DEVICE value_row row(index_t i) const noexcept {
    return {first.values + i * row_stride, first.stride};
  }
  [[nodiscard]] REFREEKV_DEVICE const value_limit& limit(index_t i) const noexcept {
    return limits[i * limit_stride];
  }
  [[nodiscard]] REFREEKV_DEVICE bool is_undecided() const noexcept {
    bool undecided = false;
    for (index_t i = 0; i < rows; ++i) undecided |= limit(i).is_undecided();
    return undecided;
  }
  [[nodiscard]] REFREEKV_DEVICE bool selects(index_t t) const noexcept {
    bool selected = false;
    for (index_t i = 0; i < rows; ++i) selected |= limit(i).selects(row(i)(t), t);
    return selected;
  }
};

/// Returns an integer that orders as the float does; -0 becomes 0. Requires no NaN.
[[nodiscard]] REFREEKV_DEVICE std::uint32_t ordered_bits(float x) noexcept {
  const std::uint32_t bits = as_bits(x == 0 ? 0.0f : x);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
[[nodiscard]] REFREEKV_DEVICE float from_ordered_bits(std::uint32_t bits) noexcept {
  return as_float(bits >> 31 != 0 ? bits & 0x7fffffffu : ~bits);
}

/// Weighs each value 1. The block shares its bins: devices combine a warp's additions of 1 to the
/// same place.
template <class Weight>
struct count_bins_of {
  using weight = Weight;
  static constexpr int digit_bits = 8;
  struct shared {
    unsigned counts[1 << digit_bits];
  };

  template <thread_block Block>
  REFREEKV_DEVICE void clear(const Block& block, shared& s) const noexcept {
    s.counts[block.rank()] = 0;
  }
  template <thread_block Block>
  REFREEKV_DEVICE void add(Block& block, shared& s, std::uint32_t bin, float) const noexcept {
    block.add(s.counts[bin], 1u);
  }
  /// values_of: how many values, all equal to `value`, weigh w. values_for: the fewest that weigh
  /// at least w.
  [[nodiscard]] REFREEKV_DEVICE static index_t values_of(weight w, float) noexcept {
    return static_cast<index_t>(w);
  }
  [[nodiscard]] REFREEKV_DEVICE static index_t values_for(weight w, float) noexcept {
    return static_cast<index_t>(w);
  }

  /// Returns the weight of a bin to the first of block_threads / bins neighbouring threads; 0 to
  /// the others.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE weight of_bin(Block& block, const shared& s) const noexcept {
    return s.counts[block.rank()];
  }
};
using count_bins = count_bins_of<unsigned>;

/// Weighs each value > 0 by itself, in fixed point. No value vanishes, and values of at least 2^-37
/// of the sum are exact. Each thread has its own bins. Devices have no 64-bit addition in shared
/// memory, only a loop of compare-and-swap in which threads that meet in a bin wait.
class mass_bins {
 public:
  using weight = std::uint64_t;
  static constexpr int digit_bits = 4;
  static constexpr int bins = 1 << digit_bits;
  struct shared {
    weight masses[bins][block_threads];
  };

  /// sum: the sum of the values, up to rounding. Requires a normal number > 0.
  REFREEKV_DEVICE explicit mass_bins(double sum) noexcept
      : scale_(detail::power_of_two(static_cast<float>(60 - std::ilogb(sum)))) {}

  [[nodiscard]] REFREEKV_DEVICE weight of(float value) const noexcept {
    if (!(value > 0)) return 0;
    const auto mass = static_cast<weight>(double{value} * scale_);
    return mass > 0 ? mass : 1;
  }
  /// Returns the weight of a sum of at least `needed`; at least 1, so that a value is needed.
  [[nodiscard]] REFREEKV_DEVICE weight at_least(double needed) const noexcept {
    const auto mass = static_cast<weight>(std::ceil(needed * scale_));
    return mass > 0 ? mass : 1;
  }
  [[nodiscard]] REFREEKV_DEVICE index_t values_of(weight w, float value) const noexcept {
    return static_cast<index_t>(std::rint(static_cast<double>(w) / static_cast<double>(of(value))));
  }
  [[nodiscard]] REFREEKV_DEVICE index_t values_for(weight w, float value) const noexcept {
    return static_cast<index_t>(std::ceil(static_cast<double>(w) / static_cast<double>(of(value))));
  }

  template <thread_block Block>
  REFREEKV_DEVICE void clear(const Block& block, shared& s) const noexcept {
    REFREEKV_UNROLL
    for (int bin = 0; bin < bins; ++bin) s.masses[bin][block.rank()] = 0;
  }
  template <thread_block Block>
  REFREEKV_DEVICE void add(const Block& block, shared& s, std::uint32_t bin,
                           float value) const noexcept {
    s.masses[bin][block.rank()] += of(value);
  }
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE weight of_bin(Block& block, const shared& s) const noexcept {
    constexpr int lanes = block_threads / bins;
    const int lane = block.rank() % lanes;
    weight sum[1] = {};
    REFREEKV_UNROLL
    for (int i = lane; i < block_threads; i += lanes) sum[0] += s.masses[block.rank() / lanes][i];
    const weight mass = block.template tile_reduce_scatter<lanes>(sum, plus{});
    return lane == 0 ? mass : 0;
  }

 private:
  double scale_;  // power of two: scales the sum to 2^60 ... 2^61, with room for rounding up
};

/// The smallest selected value, as far as its digits are found.
template <class Weight>
struct descent_end {
  std::uint32_t bits;  ///< its ordered_bits, in the digits found so far
  Weight needed;       ///< weight that values equal in these digits must contribute
  Weight equals;       ///< weight of all values equal in these digits
};

template <class Bins>
struct limit_memory {
  using weight = typename Bins::weight;

  typename Bins::shared bins;
  warp_values<weight> weights;
  descent_end<weight> end;
  warp_values<std::uint64_t> counts;
  index_t equals_end;
};

/// The digits of a value, from the top. Bin i belongs to block_threads / bins neighbouring threads.
template <class Bins>
struct descent_digits {
  static constexpr std::uint32_t bins = 1u << Bins::digit_bits;
  static constexpr int count = 32 / Bins::digit_bits;
  static constexpr int lanes = block_threads / static_cast<int>(bins);  ///< threads per bin

  [[nodiscard]] REFREEKV_DEVICE static int shift(int digit) noexcept {
    return 32 - Bins::digit_bits * (digit + 1);
  }
};

/// Weighs the values, of the row's first `count`, that share the digits found before this one.
/// Returns the weight of a bin to the first of its threads, 0 to the others. O(count / threads)
template <class Bins, thread_block Block>
[[nodiscard]] REFREEKV_DEVICE typename Bins::weight weigh(Block& block, limit_memory<Bins>& s,
                                                          const value_row& row, index_t count,
                                                          const Bins& bins,
                                                          std::uint32_t known_digits,
                                                          int digit) noexcept {
  using digits = descent_digits<Bins>;
  const int shift = digits::shift(digit);
  bins.clear(block, s.bins);
  block.sync();
  for_each_value(block, row, count, [&](float v) {
    const std::uint32_t bin = (ordered_bits(v) ^ known_digits) >> shift;
    if (bin < digits::bins) bins.add(block, s.bins, bin, v);
  });
  block.sync();
  return bins.of_bin(block, s.bins);
}

/// Returns `end` with one more digit. own: the whole row's weight of the thread's bin, as `weigh`
/// returns it. Requires end.needed > 0, and a value of non-zero weight.
template <class Bins, thread_block Block>
[[nodiscard]] REFREEKV_DEVICE descent_end<typename Bins::weight> descended(
    Block& block, limit_memory<Bins>& s, descent_end<typename Bins::weight> end,
    typename Bins::weight own, int digit) noexcept {
  using digits = descent_digits<Bins>;
  const auto bin = static_cast<std::uint32_t>(block.rank()) / digits::lanes;
  const auto sums = block_suffix_sum(block, s.weights, own);
  const auto above = sums.own - own;
  if (end.needed > sums.all) end.needed = sums.all;
  if (above < end.needed && end.needed <= sums.own) {
    s.end = {end.bits | bin << digits::shift(digit), end.needed - above, own};
  }
  block.sync();
  return s.end;
}

/// Returns the limit of values [begin, begin + count), which `row` starts with. `equals` of them
/// equal `least`; the first `wanted` of these are selected.
template <class Bins, thread_block Block>
[[nodiscard]] REFREEKV_DEVICE value_limit limit_at(Block& block, limit_memory<Bins>& s,
                                                   const value_row& row, index_t begin,
                                                   index_t count, float least, index_t wanted,
                                                   index_t equals) noexcept {
  if (wanted >= equals) return {least, begin + count};
  if (wanted <= 0) return {least, begin};
  for_each_selected(
      block, s.counts, count, [&](index_t t) { return row(t) == least; },
      [&](index_t i, index_t t) {
        if (i == wanted - 1) s.equals_end = begin + t + 1;
      });
  block.sync();
  return {least, s.equals_end};
}

/// Returns the limit of the fewest of the row's first `count` values, the largest ones, that
/// together weigh `needed`; if they do not, of all with a weight. Requires no NaN, needed > 0 and a
/// value of non-zero weight. O(count / threads) per digit
template <class Bins, thread_block Block>
[[nodiscard]] REFREEKV_DEVICE value_limit limit_of_weight(Block& block, limit_memory<Bins>& s,
                                                          const value_row& row, index_t count,
                                                          const Bins& bins,
                                                          typename Bins::weight needed) noexcept {
  descent_end<typename Bins::weight> end{0, needed, 0};
  for (int digit = 0; digit < descent_digits<Bins>::count; ++digit) {
    const auto own = weigh(block, s, row, count, bins, end.bits, digit);
    end = descended(block, s, end, own, digit);
  }
  const float least = from_ordered_bits(end.bits);
  return limit_at(block, s, row, 0, count, least, bins.values_for(end.needed, least),
                  bins.values_of(end.equals, least));
}

/// Returns the limit of the k largest of the row's first `count` values. Requires 0 < k <= count
/// and no NaN.
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE value_limit limit_of_largest(Block& block,
                                                           limit_memory<count_bins>& s,
                                                           const value_row& row, index_t count,
                                                           index_t k) noexcept {
  return limit_of_weight(block, s, row, count, count_bins{}, static_cast<unsigned>(k));
}

/// Returns the limit of the fewest of the row's first `count` values that sum to at least `needed`;
/// if they do not, of all that are not 0. Requires values >= 0 and their sum, up to rounding, > 0.
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE value_limit limit_by_mass(Block& block, limit_memory<mass_bins>& s,
                                                        const value_row& row, index_t count,
                                                        double sum, double needed) noexcept {
  const mass_bins bins(sum);
  return limit_of_weight(block, s, row, count, bins, bins.at_least(needed));
}

}  // namespace refreekv::inline v0::cuda_detail
