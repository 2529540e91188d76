// SPDX-License-Identifier: Apache-2.0
// The scratch of primitives that select tokens by score, and whether they run over a grid.
#pragma once

#include "refreekv/cuda/grid_limit.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Scratch of top_tokens, top_mass and select_pages.
struct selection_scratch {
  value_limit* limits;  ///< [sequence, q_head]
  float* page_scores;   ///< [sequence, q_head, page]; null if the layer has no page bounds
  row_cut kv_rows;      ///< how the score rows of KV heads are cut
  row_cut q_rows;       ///< how the score rows of query heads are cut
  std::byte* grid;      ///< a grid_descent of either; empty if neither is cut

  template <class Layer>
  [[nodiscard]] static selection_scratch carve(arena& from, const Layer& layer) noexcept {
    const auto cut = [&](index_t heads) {
      return row_cut::of(layer.sequences() * heads, layer.capacity());
    };
    return carve(from, layer, cut(layer.kv_heads()), cut(layer.q_heads()));
  }

  template <class Layer>
  [[nodiscard]] static selection_scratch carve(arena& from, const Layer& layer,
                                               const row_cut& kv_rows,
                                               const row_cut& q_rows) noexcept {
    selection_scratch s{};
    s.limits = from.array<value_limit>(layer.sequences(), layer.q_heads());
    if constexpr (requires { layer.pages; }) {
      s.page_scores =
          from.array<float>(layer.sequences(), layer.q_heads(), layer.pages.bounds.extent(2));
    }
    s.kv_rows = kv_rows;
    s.q_rows = q_rows;
    const std::size_t counts = grid_bytes<count_bins>(layer, layer.kv_heads(), kv_rows);
    const std::size_t masses = grid_bytes<mass_bins>(layer, layer.q_heads(), q_rows);
    s.grid = from.array<std::byte>(counts > masses ? counts : masses);
    return s;
  }

 private:
  template <class Bins, class Layer>
  [[nodiscard]] static std::size_t grid_bytes(const Layer& layer, index_t heads,
                                              const row_cut& cut) noexcept {
    if (cut.parts == 1) return 0;
    using memory = typename Layer::memory;
    const scores_view<memory> rows(nullptr, {layer.sequences(), heads, layer.capacity()});
    arena count;
    (void)grid_descent<Bins, memory>::carve(count, rows, cut);
    return count.bytes();
  }
};

}  // namespace refreekv::inline v0::cuda_detail
