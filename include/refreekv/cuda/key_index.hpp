// SPDX-License-Identifier: Apache-2.0
// Updates the 4-bit keys and the page bounds, on a device.
#pragma once

#include <cmath>

#include "refreekv/attention/page_bounds.hpp"
#include "refreekv/cache/int4_keys.hpp"
#include "refreekv/cuda/block/places.hpp"
#include "refreekv/cuda/block/row_parts.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Calls f(token, key, dim_stride) for tokens [begin, end) of one head.
template <kv_source Keys, class F>
REFREEKV_DEVICE void for_each_key(const Keys& keys, index_t sequence, index_t kv_head,
                                  index_t begin, index_t end, const F& f) noexcept {
  for (index_t t = begin; t < end;) {
    const auto run = keys.run_at(sequence, kv_head, t);
    for (index_t i = 0; i < run.tokens && t < end; ++i, ++t) {
      f(t, run.data + i * run.token_stride, run.dim_stride);
    }
  }
}

/// Writes the centres: the mean of the finite elements of each head's keys. Only for sequences that
/// start at token 0. One block per warp_threads dimensions.
template <kv_source Keys>
struct centres_body {
  using memory = typename Keys::memory;
  struct shared {
    double sums[block_warps][warp_threads];
    index_t counts[block_warps][warp_threads];
  };

  Keys keys;
  lengths_view<memory> from;
  view<float, 3, memory> centres;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t parts() const noexcept {
    return (keys.shape().head_dim + warp_threads - 1) / warp_threads;
  }
  [[nodiscard]] constexpr index_t items() const noexcept { return kv_head_items(keys) * parts(); }

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const auto [sequence, head, part, row] = part_place::of(item, keys.shape().kv_heads, parts());
    if (from.data() != nullptr && from(sequence) != 0) return;
    const index_t lane = lane_of(block), warp = warp_of(block);
    const index_t d = part * warp_threads + lane, tokens = keys.tokens(sequence);
    const index_t share = (tokens + block_warps - 1) / block_warps;  // tokens of one warp
    const index_t begin = warp * share;
    const index_t end = begin + share < tokens ? begin + share : tokens;
    double sum = 0;
    index_t count = 0;
    if (d < keys.shape().head_dim) {
      for_each_key(keys, sequence, head, begin, end, [&](index_t, const auto* key, index_t stride) {
        const float x = widen(key[d * stride]);
        const bool finite = x > -infinity && x < infinity;
        sum += finite ? double{x} : 0;
        count += finite ? 1 : 0;
      });
    }
    s.sums[warp][lane] = sum;
    s.counts[warp][lane] = count;
    block.sync();
    if (warp > 0 || d >= keys.shape().head_dim) return;
    for (index_t w = 1; w < block_warps; ++w) {
      sum += s.sums[w][lane];
      count += s.counts[w][lane];
    }
    centres(sequence, head, d) =
        static_cast<float>(sum / static_cast<double>(larger{}(count, index_t{1})));
  }
};

/// Writes codes and ranges of new keys. One warp per key.
template <kv_source Keys>
struct quantise_body {
  using memory = typename Keys::memory;
  struct shared {};
  static constexpr index_t warp_keys = 8;  ///< neighbouring keys, in one run if possible
  static constexpr index_t keys_of_block = warp_keys * block_warps;

  Keys keys;
  lengths_view<memory> from;
  int4_keys<memory> to;
  row_parts cut;

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const part_place place = part_place::of(item, keys.shape().kv_heads, cut.parts);
    const index_t sequence = place.sequence, head = place.head;
    const index_t tokens = keys.tokens(sequence);
    const index_t first = from.data() == nullptr ? 0 : at_most(tokens, from(sequence));
    const index_t offset = place.part * keys_of_block + warp_of(block) * warp_keys;
    for (index_t t = first + offset; t < tokens; t += cut.parts * keys_of_block) {
      const index_t end = t + warp_keys < tokens ? t + warp_keys : tokens;
      for_each_key(keys, sequence, head, t, end,
                   [&](index_t token, const auto* key, index_t stride) {
                     write(block, key, stride, to.centres.at(sequence, head),
                           to.codes.at(sequence, head, token), to.ranges.at(sequence, head, token));
                   });
    }
  }

 private:
  template <thread_block Block, class T>
  REFREEKV_DEVICE void write(Block& block, const T* key, index_t stride, const float* centre,
                             std::uint8_t* codes, float* range) const noexcept {
    const index_t dims = keys.shape().head_dim, pairs = (dims + 1) / 2;
    const auto at = [&](index_t d) {
      const float x = widen(key[d * stride]);
      return centre == nullptr ? x : x - centre[d];
    };
    float low = infinity, high = -infinity;
    for (index_t d = lane_of(block); d < dims; d += warp_threads) {
      low = smaller_or_nan{}(low, at(d));
      high = larger_or_nan{}(high, at(d));
    }
    low = block.warp_reduce(low, smaller_or_nan{});
    high = block.warp_reduce(high, larger_or_nan{});
    const float step = larger{}(high - low, 1e-9f) / 15;
    if (lane_of(block) == 0) {
      range[0] = low;
      range[to.ranges.stride(3)] = step;
    }
    for (index_t pair = lane_of(block); pair < pairs; pair += warp_threads) {
      unsigned bits = code(at(2 * pair), low, step);
      if (2 * pair + 1 < dims) bits |= code(at(2 * pair + 1), low, step) << 4;
      codes[pair] = static_cast<std::uint8_t>(bits);
    }
  }

  [[nodiscard]] REFREEKV_DEVICE static unsigned code(float x, float low, float step) noexcept {
    const float steps = std::rint((x - low) / step);
    return steps >= 0 && steps <= 15 ? static_cast<unsigned>(steps) : steps > 15 ? 15 : 0;
  }
};

template <class Backend, kv_source Keys>
[[nodiscard]] status quantise(const Backend& exec, const Keys& keys,
                              const lengths_view<typename Keys::memory>& from,
                              const int4_keys<typename Keys::memory>& to) noexcept {
  if (to.centres.data() != nullptr) {
    const centres_body<Keys> centres{keys, from, to.centres};
    const status s = run_blocks(exec, centres.items(), centres);
    if (s != status::ok) return s;
  }
  using body_type = quantise_body<Keys>;
  const index_t most =
      (keys.shape().capacity + body_type::keys_of_block - 1) / body_type::keys_of_block;
  const row_parts cut = row_parts::of(kv_head_items(keys), most);
  return run_blocks(exec, cut.items(), body_type{keys, from, to, cut});
}

/// Writes page bounds, from the page of token from(sequence) on. One warp per page.
template <kv_source Keys>
struct bound_pages_body {
  using memory = typename Keys::memory;
  struct shared {};
  Keys keys;
  lengths_view<memory> from;
  page_bounds<memory> to;
  row_parts cut;

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const auto [sequence, head, part, row] = part_place::of(item, keys.shape().kv_heads, cut.parts);
    const index_t tokens = keys.tokens(sequence), size = to.page_tokens;
    const index_t first = from.data() == nullptr ? 0 : at_most(tokens, from(sequence)) / size;
    for (index_t page = first + part * block_warps + warp_of(block); page * size < tokens;
         page += cut.parts * block_warps) {
      const index_t begin = page * size, end = begin + size < tokens ? begin + size : tokens;
      for (index_t d = lane_of(block); d < keys.shape().head_dim; d += warp_threads) {
        float low = infinity, high = -infinity;
        for_each_key(keys, sequence, head, begin, end,
                     [&](index_t, const auto* key, index_t stride) {
                       const float x = widen(key[d * stride]);
                       low = smaller_or_nan{}(low, x);
                       high = larger_or_nan{}(high, x);
                     });
        to.bounds(sequence, head, page, 0, d) = low;
        to.bounds(sequence, head, page, 1, d) = high;
      }
    }
  }
};

template <class Backend, kv_source Keys>
[[nodiscard]] status bound_pages(const Backend& exec, const Keys& keys,
                                 const lengths_view<typename Keys::memory>& from,
                                 const page_bounds<typename Keys::memory>& to) noexcept {
  const index_t most = (to.bounds.extent(2) + block_warps - 1) / block_warps;
  const row_parts cut = row_parts::of(kv_head_items(keys), most);
  return run_blocks(exec, cut.items(), bound_pages_body<Keys>{keys, from, to, cut});
}

}  // namespace refreekv::inline v0::cuda_detail
