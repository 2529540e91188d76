// SPDX-License-Identifier: Apache-2.0
// 4-bit keys and Quest's pages on a device.
#pragma once

#include "refreekv/cuda/row_parts.hpp"
#include "refreekv/cuda/top_tokens.hpp"
#include "refreekv/estimate.hpp"

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

/// Writes the mean of the finite elements of the keys of each head that starts at token 0, a block
/// for warp_threads dimensions.
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
    return (keys.head_dim() + warp_threads - 1) / warp_threads;
  }
  [[nodiscard]] constexpr index_t items() const noexcept {
    return keys.sequences() * keys.kv_heads() * parts();
  }

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t row = item / parts();
    const index_t sequence = row / keys.kv_heads(), head = row % keys.kv_heads();
    if (from.data() != nullptr && from(sequence) != 0) return;
    const index_t lane = lane_of(block), warp = warp_of(block);
    const index_t d = item % parts() * warp_threads + lane, tokens = keys.tokens(sequence);
    const index_t share = (tokens + block_warps - 1) / block_warps;  // of a warp
    const index_t begin = warp * share;
    const index_t end = begin + share < tokens ? begin + share : tokens;
    double sum = 0;
    index_t count = 0;
    if (d < keys.head_dim()) {
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
    if (warp > 0 || d >= keys.head_dim()) return;
    for (index_t w = 1; w < block_warps; ++w) {
      sum += s.sums[w][lane];
      count += s.counts[w][lane];
    }
    centres(sequence, head, d) =
        static_cast<float>(sum / static_cast<double>(larger{}(count, index_t{1})));
  }
};

/// Writes codes and ranges, a warp a key.
template <kv_source Keys>
struct quantise_body {
  using memory = typename Keys::memory;
  struct shared {};
  static constexpr index_t warp_keys = 8;  ///< that lie side by side, in one run if they can
  static constexpr index_t block_keys = warp_keys * block_warps;

  Keys keys;
  lengths_view<memory> from;
  int4_keys<memory> to;
  row_parts cut;

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t row = item / cut.parts, part = item % cut.parts;
    const index_t sequence = row / keys.kv_heads(), head = row % keys.kv_heads();
    const index_t tokens = keys.tokens(sequence);
    const index_t first = from.data() == nullptr ? 0 : at_most(tokens, from(sequence));
    const index_t offset = part * block_keys + warp_of(block) * warp_keys;
    for (index_t t = first + offset; t < tokens; t += cut.parts * block_keys) {
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
    const index_t dims = keys.head_dim(), pairs = (dims + 1) / 2;
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
[[nodiscard]] status quantise(const Backend& on, const Keys& keys,
                              const lengths_view<typename Keys::memory>& from,
                              const int4_keys<typename Keys::memory>& to) noexcept {
  if (to.centres.data() != nullptr) {
    const centres_body<Keys> centres{keys, from, to.centres};
    const status s = run_blocks(on, centres.items(), centres);
    if (s != status::ok) return s;
  }
  using body_type = quantise_body<Keys>;
  const index_t most = (keys.capacity() + body_type::block_keys - 1) / body_type::block_keys;
  const row_parts cut = row_parts::of(keys.sequences() * keys.kv_heads(), most);
  return run_blocks(on, cut.items(), body_type{keys, from, to, cut});
}

/// Writes the bounds of the pages from that of token from(sequence) on, a warp a page.
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
    const index_t row = item / cut.parts, part = item % cut.parts;
    const index_t sequence = row / keys.kv_heads(), head = row % keys.kv_heads();
    const index_t tokens = keys.tokens(sequence), size = to.page_tokens;
    const index_t first = from.data() == nullptr ? 0 : at_most(tokens, from(sequence)) / size;
    for (index_t page = first + part * block_warps + warp_of(block); page * size < tokens;
         page += cut.parts * block_warps) {
      const index_t begin = page * size, end = begin + size < tokens ? begin + size : tokens;
      for (index_t d = lane_of(block); d < keys.head_dim(); d += warp_threads) {
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
[[nodiscard]] status bound_pages(const Backend& on, const Keys& keys,
                                 const lengths_view<typename Keys::memory>& from,
                                 const page_bounds<typename Keys::memory>& to) noexcept {
  const index_t most = (to.bounds.extent(2) + block_warps - 1) / block_warps;
  const row_parts cut = row_parts::of(keys.sequences() * keys.kv_heads(), most);
  return run_blocks(on, cut.items(), bound_pages_body<Keys>{keys, from, to, cut});
}

/// The pages of a sequence that its last query sees.
struct seen_pages {
  index_t first;
  index_t end;

  template <class Seen>
  [[nodiscard]] REFREEKV_DEVICE static seen_pages of(const Seen& seen, index_t sequence,
                                                     index_t page_tokens) noexcept {
    const token_range visible = window_of(seen, sequence, 1).hull();
    return {visible.begin / page_tokens, (visible.end + page_tokens - 1) / page_tokens};
  }
};

/// Writes what the last query could find at most on each page it sees, a warp a page.
template <class Seen>
struct page_scores_body {
  struct shared {};
  page_bounds<typename Seen::memory> pages;
  Seen seen;
  float* page_scores;
  row_parts cut;

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t row = item / cut.parts, part = item % cut.parts;
    const index_t sequence = row / seen.kv_heads(), head = row % seen.kv_heads();
    const seen_pages there = seen_pages::of(seen, sequence, pages.page_tokens);
    const index_t group = seen.q_heads() / seen.kv_heads();
    for (index_t page = there.first + part * block_warps + warp_of(block); page < there.end;
         page += cut.parts * block_warps) {
      for (index_t h = head * group; h < (head + 1) * group; ++h) {
        float score = 0;
        for (index_t d = lane_of(block); d < seen.head_dim(); d += warp_threads) {
          const float q = widen(seen.queries(sequence, seen.window() - 1, h, d));
          const float low = q * pages.bounds(sequence, head, page, 0, d);
          const float high = q * pages.bounds(sequence, head, page, 1, d);
          score += low > high ? low : high;
        }
        score = block.warp_reduce(score, plus{});
        if (lane_of(block) == 0) {
          page_scores[(sequence * seen.q_heads() + h) * pages.bounds.extent(2) + page] = score;
        }
      }
    }
  }
};

/// Finds which pages a query head takes: the best, or all where one has no score.
template <class Seen>
struct page_limits_body {
  using shared = limit_memory<count_bins>;
  page_bounds<typename Seen::memory> pages;
  index_t wanted;
  Seen seen;
  selection_scratch scratch;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.q_heads();
  }

  /// item: [sequence, q_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const seen_pages there = seen_pages::of(seen, item / seen.q_heads(), pages.page_tokens);
    const float* scores = scratch.page_scores + item * pages.bounds.extent(2);
    const value_row row{scores + there.first, 1};
    const index_t count = there.end - there.first;
    value_limit limit = value_limit::everything();
    if (wanted < count && !any_nan(block, row, count)) {
      limit = limit_of_largest(block, s, row, count, wanted);
    }
    if (block.rank() == 0) scratch.limits[item] = limit;
  }
};

/// Takes the scores of the other pages away, a thread a token.
template <class Seen>
struct clear_pages_body {
  struct shared {};
  page_bounds<typename Seen::memory> pages;
  Seen seen;
  scores_view<typename Seen::memory> scores;
  selection_scratch scratch;
  row_parts cut;

  /// item: [sequence, q_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t row = item / cut.parts, part = item % cut.parts;
    const index_t sequence = row / seen.q_heads(), head = row % seen.q_heads();
    const index_t size = pages.page_tokens;
    const seen_pages there = seen_pages::of(seen, sequence, size);
    const index_t tokens =
        seen.tokens(sequence) < there.end * size ? seen.tokens(sequence) : there.end * size;
    const float* page_scores = scratch.page_scores + row * pages.bounds.extent(2);
    const value_limit limit = scratch.limits[row];
    for (index_t t = there.first * size + part * block_threads + block.rank(); t < tokens;
         t += cut.parts * block_threads) {
      // Both fit in 32 bits, in which devices divide faster.
      const auto page = static_cast<std::uint32_t>(t) / static_cast<std::uint32_t>(size);
      if (!limit.takes(page_scores[page], page - there.first)) scores(sequence, head, t) = 0;
    }
  }
};

template <class Backend, class Seen>
[[nodiscard]] status select_pages(const Backend& on,
                                  const page_bounds<typename Seen::memory>& pages, index_t tokens,
                                  const Seen& seen,
                                  const scores_view<typename Seen::memory>& scores,
                                  const selection_scratch& scratch) noexcept {
  const index_t size = pages.page_tokens;
  const index_t wanted = (tokens > size ? tokens / size : 1) + (tokens % size != 0 ? 1 : 0);
  const row_parts page_parts = row_parts::of(
      seen.sequences() * seen.kv_heads(), (pages.bounds.extent(2) + block_warps - 1) / block_warps);
  const page_scores_body<Seen> score{pages, seen, scratch.page_scores, page_parts};
  status s = run_blocks(on, page_parts.items(), score);
  if (s != status::ok) return s;
  const page_limits_body<Seen> limit{pages, wanted, seen, scratch};
  s = run_blocks(on, limit.items(), limit);
  if (s != status::ok) return s;
  const row_parts token_parts =
      row_parts::of(seen.sequences() * seen.q_heads(), blocks_for(seen.capacity()));
  const clear_pages_body<Seen> clear{pages, seen, scores, scratch, token_parts};
  return run_blocks(on, token_parts.items(), clear);
}

}  // namespace refreekv::inline v0::cuda_detail
