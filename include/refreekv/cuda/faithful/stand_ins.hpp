// SPDX-License-Identifier: Apache-2.0
// Stand-ins on a device: rows that replace the tokens that a size drops.
#pragma once

#include "refreekv/cuda/faithful/bare_logits.hpp"
#include "refreekv/cuda/faithful/stand_in_slots.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Fits the stand-ins. Let a be the mean attention of the tokens that one replaces, normalised to
/// sum 1, and S their logits in a row. The value is sum a v. The key is k0 = sum a k, moved so that
/// its logits come near log sum exp S, by ridge regression over all rows.
template <class Layer, class Values, int Rows>
struct fit_body {
  using memory = typename Layer::memory;
  using keys_type = std::remove_cvref_t<decltype(std::declval<Layer>().keys)>;
  static constexpr int most_together = block_warps;

  struct shared {
    cuda_detail::tile<Layer, Rows> tile;
    position_t list[block_threads];       ///< the dropped tokens
    float weights[block_threads];         ///< of the list's tokens; their sum is 1 per stand-in
    int block_begins[most_together + 1];  ///< where each block of positions begins in the list
    int begins[block_threads + 1];        ///< where each stand-in begins in the list
    float gaps[std::size_t{Rows}][most_together];  ///< excess of k0's logit in a row
    warp_values<int> counts;
  };
  /// Stand-ins that are fitted together.
  struct fitted {
    int sequence, kv_head;
    index_t slot;       ///< of the first one
    int count;          ///< <= most_together
    const int* begins;  ///< [count + 1]: where each one begins in the list
  };

  Layer layer;
  Values values;
  index_t block_tokens;
  graded_sizes<memory> graded;
  stand_in_rows<memory> to;
  importance_scratch scratch;

  /// Blocks of positions in one list.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t together() const noexcept {
    const index_t most = chunk_tokens / block_tokens;
    return most < most_together ? most : most_together;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t parts() const noexcept {
    return (scratch.blocks + together() - 1) / together();
  }
  [[nodiscard]] constexpr index_t items() const noexcept { return kv_head_items(layer) * parts(); }

  /// item: [sequence, part, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t kv_head = item % layer.kv_heads(), part = item / layer.kv_heads() % parts();
    const index_t sequence = item / layer.kv_heads() / parts(), first = part * together();
    if (!graded.is_open(sequence) || to.counts(sequence, kv_head) == 0) return;
    const index_t left = (layer.tokens(sequence) + block_tokens - 1) / block_tokens - first;
    if (left <= 0) return;
    const position_t* const slots =
        scratch.slots + (sequence * layer.kv_heads() + kv_head) * (scratch.blocks + 1) + first;
    const int count = slots[left < together() ? left : together()] - slots[0];
    if (count == 0) return;
    list(block, s, sequence, kv_head, first * block_tokens, slots, count);
    REFREEKV_NO_UNROLL
    for (int i = 0; i < count; i += most_together) {
      const int some = count - i < most_together ? count - i : most_together;
      fit(block, s, {narrow(sequence), narrow(kv_head), index_t{slots[0]} + i, some, s.begins + i});
    }
  }

 private:
  /// Lists the dropped tokens of some blocks of positions. Writes where each stand-in begins.
  template <thread_block Block>
  REFREEKV_DEVICE void list(Block& block, shared& s, index_t sequence, index_t kv_head,
                            index_t first, const position_t* slots, int count) const noexcept {
    const index_t token = first + block.rank();
    const int width = narrow(block_tokens), blocks = narrow(together());
    const int own = block.rank() / width;
    const bool dropped = own < blocks && token < layer.tokens(sequence) &&
                         graded.drops(sequence, kv_head, token, graded.sizes[sequence]);
    const auto sums = block_prefix_sum(block, s.counts, dropped ? 1 : 0);
    const int at = sums.own - 1;
    if (dropped) s.list[at] = static_cast<position_t>(token);
    if (own < blocks && block.rank() % width == 0) {
      s.block_begins[own] = sums.own - (dropped ? 1 : 0);
    }
    if (block.rank() == 0) {
      s.block_begins[blocks] = sums.all;
      s.begins[count] = sums.all;
    }
    block.sync();
    if (dropped) {
      // The stand-ins of a block share its dropped tokens evenly.
      const int begin = s.block_begins[own], all = s.block_begins[own + 1] - begin;
      const int rows = slots[own + 1] - slots[own], part = (at - begin) * rows / all;
      if (at == begin || (at - begin - 1) * rows / all != part) {
        s.begins[slots[own] - slots[0] + part] = at;
      }
    }
    block.sync();
  }

  template <thread_block Block>
  REFREEKV_DEVICE void fit(Block& block, shared& s, const fitted& own) const noexcept {
    weigh(block, s, own);
    add_rows(block, s, own, layer.keys, to.keys);
    add_rows(block, s, own, values, to.values);
    block.sync();
    const row_span span = rows_there(window_of(layer, own.sequence, scratch.rows), own.kv_head,
                                     layer.q_heads() / layer.kv_heads());
    listed_place<row_span> at{
        own.sequence,          own.kv_head, span, 0, own.begins[own.count] - own.begins[0],
        s.list + own.begins[0]};
    REFREEKV_NO_UNROLL
    for (at.first = 0; at.first < span.count(); at.first += Rows) {
      multiply<any_lanes>(block, s.tile, layer, scratch.rows, at);
      block.sync();
      find_gaps(block, s, own, at);
      block.sync();
      move(block, s, own, at);
    }
    block.sync();
  }

  /// Writes the weights. One warp per stand-in.
  template <thread_block Block>
  REFREEKV_DEVICE void weigh(Block& block, shared& s, const fitted& own) const noexcept {
    const float* const attention =
        scratch.attention + (own.sequence * layer.kv_heads() + own.kv_head) * layer.capacity();
    if (const int n = warp_of(block); n < own.count) {
      const int begin = own.begins[n] + lane_of(block), end = own.begins[n + 1];
      double total = 0;
      for (int i = begin; i < end; i += warp_threads) {
        total += double{attention[s.list[i]] + 1e-12f};
      }
      total = block.warp_reduce(total, plus{});
      for (int i = begin; i < end; i += warp_threads) {
        // 1e-12 makes the weights equal where no row attends.
        s.weights[i] = static_cast<float>(double{attention[s.list[i]] + 1e-12f} / total);
      }
    }
    block.sync();
  }

  /// Calls f(stand-in, dimension) for each element. A warp handles 32 adjacent dimensions.
  template <thread_block Block, class F>
  REFREEKV_DEVICE void for_each_place(const Block& block, const fitted& own, index_t dims,
                                      const F& f) const noexcept {
    const int strips = narrow((dims + warp_threads - 1) / warp_threads);
    REFREEKV_NO_UNROLL
    for (int p = warp_of(block); p < own.count * strips; p += block_warps) {
      const index_t d = p % strips * warp_threads + lane_of(block);
      if (d < dims) f(p / strips, d);
    }
  }

  /// Writes to each stand-in the weighted sum of the rows that it replaces.
  template <thread_block Block, class Source>
  REFREEKV_DEVICE void add_rows(const Block& block, const shared& s, const fitted& own,
                                const Source& source,
                                const view<float, 4, memory>& rows) const noexcept {
    for_each_place(block, own, source.shape().head_dim, [&](int n, index_t d) {
      float sum = 0;
      for_each_element(
          source, own.sequence, own.kv_head, d, own.begins[n], own.begins[n + 1], 1,
          [&](int i) { return index_t{s.list[i]}; },
          [&](int i, float x) { sum += s.weights[i] * x; });
      rows.at(own.sequence, own.kv_head, own.slot + n)[d] = sum;
    });
  }

  /// Writes gaps: the excess of k0's logits in the tile's rows. One warp per row and stand-in.
  template <thread_block Block, class Place>
  REFREEKV_DEVICE void find_gaps(Block& block, shared& s, const fitted& own,
                                 const Place& at) const noexcept {
    const logit_cap cap = logit_cap::of(layer.info.attention.soft_cap);
    REFREEKV_NO_UNROLL
    for (int p = warp_of(block); p < Rows * own.count; p += block_warps) {
      const int row = p % Rows, n = p / Rows;
      if (at.first + row >= at.span.count()) continue;
      const int first = own.begins[0], end = own.begins[n + 1];
      double start = 0;  // the logit of k0: the weighted sum of logits before a cap
      float peak = -infinity, sum = 0;
      for (int i = own.begins[n] + lane_of(block); i < end; i += warp_threads) {
        float& value = s.tile.values[row][i - first];
        const float x = key_reader<keys_type>::product(s.tile.keys[i - first], value) *
                        layer.info.attention.scale;
        start += double{s.weights[i]} * double{x};
        value = cap(x);
        peak = larger{}(peak, value);
      }
      peak = block.warp_reduce(peak, larger{});
      for (int i = own.begins[n] + lane_of(block); i < end; i += warp_threads) {
        sum += std::exp(s.tile.values[row][i - first] - peak);
      }
      start = block.warp_reduce(start, plus{});
      const double wanted = double{peak} + std::log(double{block.warp_reduce(sum, plus{})});
      if (lane_of(block) == 0) {
        s.gaps[row][n] = static_cast<float>(start - detail::uncapped(wanted, cap.cap));
      }
    }
  }

  /// Adds to each key the change that removes the gaps of the tile's rows.
  template <thread_block Block, class Place>
  REFREEKV_DEVICE void move(const Block& block, const shared& s, const fitted& own,
                            const Place& at) const noexcept {
    const int left = at.span.count() - at.first, rows = left < Rows ? left : Rows;
    const index_t dims = layer.head_dim();
    for_each_place(block, own, dims, [&](int n, index_t d) {
      float sum = 0;
      REFREEKV_UNROLL
      for (int i = 0; i < Rows; ++i) {
        if (i >= rows) break;
        const int of = at.first + i;
        const index_t row =
            (own.sequence * layer.q_heads() + at.span.q_head_of(of)) * scratch.rows +
            at.span.row_of(of);
        sum += s.gaps[i][n] * scratch.map[row * dims + d];
      }
      to.keys.at(own.sequence, own.kv_head, own.slot + n)[d] += sum;
    });
  }
};

/// Fits the stand-ins of the open sequences: one for each block of positions that drops a token or,
/// with `evenly`, the same number in all KV heads.
template <class Backend, class Valued>
[[nodiscard]] status fit_open(const Backend& exec, const importance_rule& rule,
                              const Valued& valued,
                              const graded_sizes<typename Valued::memory>& graded,
                              const stand_in_rows<typename Valued::memory>& to, bool evenly,
                              const importance_scratch& scratch) noexcept {
  const auto& layer = detail::plain(valued);
  using layer_type = std::remove_cvref_t<decltype(layer)>;
  using values_type = std::remove_cvref_t<decltype(valued.values)>;
  const slots_body<layer_type> slots{layer,         rule.block,       graded,   scratch.blocks,
                                     scratch.slots, scratch.standing, to.counts};
  status s = run_blocks(exec, kv_head_items(layer), slots);
  if (s == status::ok && evenly) {
    const even_slots_body<layer_type> even{
        layer, rule.block, graded, scratch.blocks, scratch.slots, scratch.standing, to.counts};
    s = run_blocks(exec, kv_head_items(layer), even);
  }
  if (s != status::ok) return s;
  return with_tile<most_rows<layer_type>>(
      layer.q_heads() / layer.kv_heads() * scratch.rows, [&](auto tile) {
        const fit_body<layer_type, values_type, tile()> fit{
            scaled(layer), valued.values, rule.block, graded, to, scratch};
        return run_blocks(exec, fit.items(), fit);
      });
}

/// The primitive `fit_stand_ins`: see `ops`.
template <class Backend, class Valued>
[[nodiscard]] status fit_stand_ins(const Backend& exec, const importance_rule& rule,
                                   const Valued& valued,
                                   const view<const grade, 3, typename Valued::memory>& grades,
                                   const position_t* sizes,
                                   const stand_in_rows<typename Valued::memory>& to,
                                   const importance_scratch& scratch) noexcept {
  return fit_open(exec, rule, valued, {grades, sizes, nullptr}, to, rule.scope == cut_scope::layer,
                  scratch);
}

}  // namespace refreekv::inline v0::cuda_detail
