// SPDX-License-Identifier: Apache-2.0
// Stand-ins on a device: rows that take the place of what a size drops.
#pragma once

#include "refreekv/cuda/bare_logits.hpp"
#include "refreekv/cuda/importance_scratch.hpp"
#include "refreekv/cuda/value_row.hpp"
#include "refreekv/stand_ins.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The size that each sequence is to have, of tokens with grades.
template <class Memory>
struct graded_sizes {
  view<const grade, 3, Memory> grades;
  const position_t* sizes;   ///< [sequence]
  const size_range* ranges;  ///< [sequence]: those that are not open are left alone; null: all work

  [[nodiscard]] REFREEKV_DEVICE bool is_open(index_t sequence) const noexcept {
    return ranges == nullptr || ranges[sequence].is_open();
  }
  [[nodiscard]] REFREEKV_DEVICE bool drops(index_t sequence, index_t kv_head, index_t token,
                                           int size) const noexcept {
    const grade g = grades(sequence, kv_head, token);
    return int{g} > size && g != grade_never;
  }
};

/// Gives a stand-in to each block of positions of which something is dropped.
template <class Seen>
struct slots_body {
  using memory = typename Seen::memory;
  using shared = warp_values<std::uint64_t>;
  Seen seen;
  index_t block_tokens;
  graded_sizes<memory> graded;
  index_t blocks;     ///< of the longest sequence
  position_t* slots;  ///< [sequence, kv_head, block]
  view<position_t, 2, memory> counts;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.kv_heads();
  }

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t sequence = item / seen.kv_heads(), kv_head = item % seen.kv_heads();
    if (!graded.is_open(sequence)) return;
    const index_t tokens = seen.tokens(sequence);
    const int size = graded.sizes[sequence];
    const index_t count = (tokens + block_tokens - 1) / block_tokens;
    position_t* const own = slots + item * blocks;
    std::uint64_t dropped = 0;
    const index_t standing = for_each_where(
        block, s, count,
        [&](index_t b) {
          const index_t end = tokens < (b + 1) * block_tokens ? tokens : (b + 1) * block_tokens;
          const std::uint64_t before = dropped;
          for (index_t t = b * block_tokens; t < end; ++t) {
            dropped += graded.drops(sequence, kv_head, t, size) ? 1u : 0u;
          }
          own[b] = -1;
          return dropped > before;
        },
        [&](index_t i, index_t b) { own[b] = static_cast<position_t>(i); });
    // One token is its own best stand-in.
    const bool stands_in = block_prefix_sum(block, s, dropped).all >= 2;
    for (index_t b = block.rank(); b < count && !stands_in; b += block_threads) own[b] = -1;
    if (block.rank() == 0) {
      counts(sequence, kv_head) = static_cast<position_t>(stands_in ? standing : 0);
    }
  }
};

/// Fits one row for what is dropped of each block of positions. With a and S of the tokens that are
/// dropped, a being their mean attention, normalised: the value is sum a v, and the key is k0 = sum
/// a k moved to where its logits come near log sum exp S, in the ridge regression over all rows.
template <class Seen, class Values, int Rows>
struct fit_body {
  using memory = typename Seen::memory;
  using keys_type = std::remove_cvref_t<decltype(std::declval<Seen>().keys)>;
  static constexpr int most_blocks = block_warps;

  struct shared {
    cuda_detail::tile<Seen, Rows> tile;
    position_t list[block_threads];  ///< tokens that are dropped
    float weights[block_threads];    ///< of the listed ones, which sum to 1 in each block
    int begins[most_blocks + 1];     ///< of each block in the list
    float gaps[std::size_t{Rows}][most_blocks];  ///< by how much a row's logit is too large
    warp_values<int> counts;
  };

  Seen seen;
  Values values;
  index_t block_tokens;
  graded_sizes<memory> graded;
  stand_in_rows<memory> to;
  importance_scratch scratch;

  /// Blocks of positions that are fitted together.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t together() const noexcept {
    const index_t most = chunk_tokens / block_tokens;
    return most < most_blocks ? most : most_blocks;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t parts() const noexcept {
    return (scratch.blocks + together() - 1) / together();
  }
  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.kv_heads() * parts();
  }

  /// item: [sequence, part, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t kv_head = item % seen.kv_heads(), part = item / seen.kv_heads() % parts();
    const index_t sequence = item / seen.kv_heads() / parts();
    if (!graded.is_open(sequence) || to.counts(sequence, kv_head) == 0) return;
    const index_t first = part * together(), tokens = seen.tokens(sequence);
    if (first * block_tokens >= tokens) return;
    const position_t* const slots =
        scratch.slots + (sequence * seen.kv_heads() + kv_head) * scratch.blocks + first;
    const int blocks = narrow(together());
    const int count = list(block, s, sequence, kv_head, first * block_tokens, blocks);
    if (count == 0) return;
    weigh(block, s, sequence, kv_head, blocks);
    start(block, s, sequence, kv_head, slots, blocks);
    const row_span span = rows_there(window_of(seen, sequence, scratch.rows), kv_head,
                                     seen.q_heads() / seen.kv_heads());
    listed_place<row_span> at{narrow(sequence), narrow(kv_head), span, 0, count, s.list};
    REFREEKV_NO_UNROLL
    for (at.first = 0; at.first < span.count(); at.first += Rows) {
      multiply<any_lanes>(block, s.tile, seen, scratch.rows, at);
      block.sync();
      find_gaps(block, s, at, blocks);
      block.sync();
      move(block, s, at, slots, blocks);
    }
  }

 private:
  /// Lists what is dropped of the tokens of some blocks, and returns how many those are.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE int list(Block& block, shared& s, index_t sequence, index_t kv_head,
                                         index_t first, int blocks) const noexcept {
    const index_t token = first + block.rank();
    const int width = narrow(block_tokens);
    const bool dropped = block.rank() < blocks * width && token < seen.tokens(sequence) &&
                         graded.drops(sequence, kv_head, token, graded.sizes[sequence]);
    const auto sums = block_prefix_sum(block, s.counts, dropped ? 1 : 0);
    if (dropped) s.list[sums.own - 1] = static_cast<position_t>(token);
    if (block.rank() < blocks * width && block.rank() % width == 0) {
      s.begins[block.rank() / width] = sums.own - (dropped ? 1 : 0);
    }
    if (block.rank() == 0) s.begins[blocks] = sums.all;
    block.sync();
    return sums.all;
  }

  /// A warp a block of positions.
  template <thread_block Block>
  REFREEKV_DEVICE void weigh(Block& block, shared& s, index_t sequence, index_t kv_head,
                             int blocks) const noexcept {
    const float* const attention =
        scratch.attention + (sequence * seen.kv_heads() + kv_head) * seen.capacity();
    if (const int b = warp_of(block); b < blocks) {
      double total = 0;
      for (int i = s.begins[b] + lane_of(block); i < s.begins[b + 1]; i += warp_threads) {
        total += double{attention[s.list[i]] + 1e-12f};
      }
      total = block.warp_reduce(total, plus{});
      for (int i = s.begins[b] + lane_of(block); i < s.begins[b + 1]; i += warp_threads) {
        // Where no row looks all weigh the same.
        s.weights[i] = static_cast<float>(double{attention[s.list[i]] + 1e-12f} / total);
      }
    }
    block.sync();
  }

  /// Writes values, and keys as they are before they move.
  template <thread_block Block>
  REFREEKV_DEVICE void start(Block& block, shared& s, index_t sequence, index_t kv_head,
                             const position_t* slots, int blocks) const noexcept {
    add_rows(block, s, seen.keys, sequence, kv_head, slots, blocks, to.keys);
    add_rows(block, s, values, sequence, kv_head, slots, blocks, to.values);
    block.sync();
  }

  /// Calls f(block of positions, dimension): a warp takes dimensions side by side.
  template <thread_block Block, class F>
  REFREEKV_DEVICE void for_each_element(const Block& block, const shared& s, int blocks,
                                        index_t dims, const F& f) const noexcept {
    const int strips = narrow((dims + warp_threads - 1) / warp_threads);
    REFREEKV_NO_UNROLL
    for (int p = warp_of(block); p < blocks * strips; p += block_warps) {
      const int b = p / strips;
      const index_t d = p % strips * warp_threads + lane_of(block);
      if (d < dims && s.begins[b] < s.begins[b + 1]) f(b, d);
    }
  }

  /// Writes the weighted sum of each block's rows.
  template <thread_block Block, class Source>
  REFREEKV_DEVICE void add_rows(const Block& block, const shared& s, const Source& source,
                                index_t sequence, index_t kv_head, const position_t* slots,
                                int blocks, const view<float, 4, memory>& rows) const noexcept {
    for_each_element(block, s, blocks, source.head_dim(), [&](int b, index_t d) {
      float sum = 0;
      for (int i = s.begins[b]; i < s.begins[b + 1]; ++i) {
        sum += s.weights[i] * cache_row<Source>::of(source, sequence, kv_head, s.list[i])[d];
      }
      rows.at(sequence, kv_head, slots[b])[d] = sum;
    });
  }

  /// By how much a key's logits are too large in the tile's rows. A warp a row of a block.
  template <thread_block Block, class Place>
  REFREEKV_DEVICE void find_gaps(Block& block, shared& s, const Place& at,
                                 int blocks) const noexcept {
    const logit_cap cap = logit_cap::of(seen.info.attention.soft_cap);
    REFREEKV_NO_UNROLL
    for (int p = warp_of(block); p < Rows * blocks; p += block_warps) {
      const int row = p % Rows, b = p / Rows;
      if (at.first + row >= at.span.count() || s.begins[b] == s.begins[b + 1]) continue;
      double own = 0;  // the logit of k0, which is a sum of those before a cap
      float peak = -infinity, sum = 0;
      for (int i = s.begins[b] + lane_of(block); i < s.begins[b + 1]; i += warp_threads) {
        float& value = s.tile.values[row][i];
        const float x =
            key_reader<keys_type>::product(s.tile.keys[i], value) * seen.info.attention.scale;
        own += double{s.weights[i]} * double{x};
        value = cap(x);
        peak = larger{}(peak, value);
      }
      peak = block.warp_reduce(peak, larger{});
      for (int i = s.begins[b] + lane_of(block); i < s.begins[b + 1]; i += warp_threads) {
        sum += std::exp(s.tile.values[row][i] - peak);
      }
      own = block.warp_reduce(own, plus{});
      const double wanted = double{peak} + std::log(double{block.warp_reduce(sum, plus{})});
      if (lane_of(block) == 0) {
        s.gaps[row][b] = static_cast<float>(own - uncapped(wanted, cap.cap));
      }
    }
  }

  /// Moves keys by what the tile's rows ask for.
  template <thread_block Block, class Place>
  REFREEKV_DEVICE void move(const Block& block, const shared& s, const Place& at,
                            const position_t* slots, int blocks) const noexcept {
    const int left = at.span.count() - at.first, rows = left < Rows ? left : Rows;
    const index_t dims = seen.head_dim();
    for_each_element(block, s, blocks, dims, [&](int b, index_t d) {
      float sum = 0;
      REFREEKV_UNROLL
      for (int i = 0; i < Rows; ++i) {
        if (i >= rows) break;
        const int of = at.first + i;
        const index_t row = (at.sequence * seen.q_heads() + at.span.q_head_of(of)) * scratch.rows +
                            at.span.row_of(of);
        sum += s.gaps[i][b] * scratch.map[row * dims + d];
      }
      to.keys.at(at.sequence, at.kv_head, slots[b])[d] += sum;
    });
  }
};

/// Fits the stand-ins of the sequences that are open.
template <class Backend, class Valued>
[[nodiscard]] status fit_open(const Backend& on, const importance_rule& rule, const Valued& valued,
                              const graded_sizes<typename Valued::memory>& graded,
                              const stand_in_rows<typename Valued::memory>& to,
                              const importance_scratch& scratch) noexcept {
  const auto& seen = observed(valued);
  using seen_type = std::remove_cvref_t<decltype(seen)>;
  using values_type = std::remove_cvref_t<decltype(valued.values)>;
  const slots_body<seen_type> slots{seen,           rule.block,    graded,
                                    scratch.blocks, scratch.slots, to.counts};
  const status s = run_blocks(on, slots.items(), slots);
  if (s != status::ok) return s;
  return with_tile<few_rows<seen_type>>(
      seen.q_heads() / seen.kv_heads() * scratch.rows, [&](auto tile) {
        const fit_body<seen_type, values_type, tile()> fit{
            scaled(seen), valued.values, rule.block, graded, to, scratch};
        return run_blocks(on, fit.items(), fit);
      });
}

template <class Backend, class Valued>
[[nodiscard]] status fit_stand_ins(const Backend& on, const importance_rule& rule,
                                   const Valued& valued,
                                   const view<const grade, 3, typename Valued::memory>& grades,
                                   const position_t* sizes,
                                   const stand_in_rows<typename Valued::memory>& to,
                                   const importance_scratch& scratch) noexcept {
  return fit_open(on, rule, valued, {grades, sizes, nullptr}, to, scratch);
}

}  // namespace refreekv::inline v0::cuda_detail
