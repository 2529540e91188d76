// SPDX-License-Identifier: Apache-2.0
// Page selection by Quest (arXiv 2406.10774), on a device.
#pragma once

#include "refreekv/attention/page_bounds.hpp"
#include "refreekv/cuda/top_tokens.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The pages [first, end) of a sequence that its last query sees.
struct seen_pages {
  index_t first;
  index_t end;

  template <class Layer>
  [[nodiscard]] REFREEKV_DEVICE static seen_pages of(const Layer& layer, index_t sequence,
                                                     index_t page_tokens) noexcept {
    const token_range visible = window_of(layer, sequence, 1).hull();
    return {visible.begin / page_tokens, (visible.end + page_tokens - 1) / page_tokens};
  }
};

/// Writes an upper bound of the last query's product with any key, for each page that it sees. One
/// warp per page.
template <class Layer>
struct page_scores_body {
  struct shared {};
  page_bounds<typename Layer::memory> pages;
  Layer layer;
  float* page_scores;
  row_parts cut;

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const auto [sequence, head, part, row] = part_place::of(item, layer.kv_heads(), cut.parts);
    const seen_pages visible = seen_pages::of(layer, sequence, pages.page_tokens);
    const index_t group = layer.q_heads() / layer.kv_heads();
    for (index_t page = visible.first + part * block_warps + warp_of(block); page < visible.end;
         page += cut.parts * block_warps) {
      for (index_t h = head * group; h < (head + 1) * group; ++h) {
        float score = 0;
        for (index_t d = lane_of(block); d < layer.head_dim(); d += warp_threads) {
          const float q = widen(layer.queries(sequence, layer.window() - 1, h, d));
          const float low = q * pages.bounds(sequence, head, page, 0, d);
          const float high = q * pages.bounds(sequence, head, page, 1, d);
          score += low > high ? low : high;
        }
        score = block.warp_reduce(score, plus{});
        if (lane_of(block) == 0) {
          page_scores[(sequence * layer.q_heads() + h) * pages.bounds.extent(2) + page] = score;
        }
      }
    }
  }
};

/// Finds the pages that a query head selects: the best ones, or all if any score is NaN.
template <class Layer>
struct page_limits_body {
  using shared = limit_memory<count_bins>;
  page_bounds<typename Layer::memory> pages;
  index_t wanted;
  Layer layer;
  selection_scratch scratch;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return layer.sequences() * layer.q_heads();
  }

  /// item: [sequence, q_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const seen_pages visible = seen_pages::of(layer, item / layer.q_heads(), pages.page_tokens);
    const float* scores = scratch.page_scores + item * pages.bounds.extent(2);
    const value_row row{scores + visible.first, 1};
    const index_t count = visible.end - visible.first;
    value_limit limit = value_limit::everything();
    if (wanted < count && !any_nan(block, row, count)) {
      limit = limit_of_largest(block, s, row, count, wanted);
    }
    if (block.rank() == 0) scratch.limits[item] = limit;
  }
};

/// Sets the scores of tokens on other pages to 0. One thread per token.
template <class Layer>
struct clear_pages_body {
  struct shared {};
  page_bounds<typename Layer::memory> pages;
  Layer layer;
  scores_view<typename Layer::memory> scores;
  selection_scratch scratch;
  row_parts cut;

  /// item: [sequence, q_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t row = item / cut.parts, part = item % cut.parts;
    const index_t sequence = row / layer.q_heads(), head = row % layer.q_heads();
    const index_t size = pages.page_tokens;
    const seen_pages visible = seen_pages::of(layer, sequence, size);
    const index_t tokens =
        layer.tokens(sequence) < visible.end * size ? layer.tokens(sequence) : visible.end * size;
    const float* page_scores = scratch.page_scores + row * pages.bounds.extent(2);
    const value_limit limit = scratch.limits[row];
    for (index_t t = visible.first * size + part * block_threads + block.rank(); t < tokens;
         t += cut.parts * block_threads) {
      // Both fit in 32 bits, which devices divide faster than 64.
      const auto page = static_cast<std::uint32_t>(t) / static_cast<std::uint32_t>(size);
      if (!limit.selects(page_scores[page], page - visible.first)) scores(sequence, head, t) = 0;
    }
  }
};

template <class Backend, class Layer>
[[nodiscard]] status select_pages(const Backend& exec,
                                  const page_bounds<typename Layer::memory>& pages, index_t tokens,
                                  const Layer& layer,
                                  const scores_view<typename Layer::memory>& scores,
                                  const selection_scratch& scratch) noexcept {
  const index_t size = pages.page_tokens;
  const index_t wanted = (tokens > size ? tokens / size : 1) + (tokens % size != 0 ? 1 : 0);
  const row_parts page_parts =
      row_parts::of(kv_head_items(layer), (pages.bounds.extent(2) + block_warps - 1) / block_warps);
  const page_scores_body<Layer> score{pages, layer, scratch.page_scores, page_parts};
  status s = run_blocks(exec, page_parts.items(), score);
  if (s != status::ok) return s;
  const page_limits_body<Layer> limit{pages, wanted, layer, scratch};
  s = run_blocks(exec, limit.items(), limit);
  if (s != status::ok) return s;
  const row_parts token_parts =
      row_parts::of(layer.sequences() * layer.q_heads(), blocks_for(layer.capacity()));
  const clear_pages_body<Layer> clear{pages, layer, scores, scratch, token_parts};
  return run_blocks(exec, token_parts.items(), clear);
}

}  // namespace refreekv::inline v0::cuda_detail
