// SPDX-License-Identifier: Apache-2.0
// What choosing tokens by score works in, and whether it does so over a grid.
#pragma once

#include "refreekv/cuda/grid_limit.hpp"

namespace refreekv::inline v0::cuda_detail {

struct selection_scratch {
  value_limit* limits;  ///< [sequence, q_head]
  float* page_scores;   ///< [sequence, q_head, page]; null where no bounds of pages are observed
  row_cut kv_rows;      ///< how the scores of KV heads are cut
  row_cut q_rows;       ///< and those of query heads
  std::byte* grid;      ///< a grid_descent of the ones or the others; empty where none are cut

  template <class Seen>
  [[nodiscard]] static selection_scratch take(arena& from, const Seen& seen) noexcept {
    const auto cut = [&](index_t heads) {
      return row_cut::of(seen.sequences() * heads, seen.capacity());
    };
    return take(from, seen, cut(seen.kv_heads()), cut(seen.q_heads()));
  }

  template <class Seen>
  [[nodiscard]] static selection_scratch take(arena& from, const Seen& seen, const row_cut& kv_rows,
                                              const row_cut& q_rows) noexcept {
    selection_scratch s{};
    s.limits = from.take<value_limit>(seen.sequences(), seen.q_heads());
    if constexpr (requires { seen.pages; }) {
      s.page_scores =
          from.take<float>(seen.sequences(), seen.q_heads(), seen.pages.bounds.extent(2));
    }
    s.kv_rows = kv_rows;
    s.q_rows = q_rows;
    const std::size_t counts = grid_bytes<count_bins>(seen, seen.kv_heads(), kv_rows);
    const std::size_t masses = grid_bytes<mass_bins>(seen, seen.q_heads(), q_rows);
    s.grid = from.take<std::byte>(counts > masses ? counts : masses);
    return s;
  }

 private:
  template <class Bins, class Seen>
  [[nodiscard]] static std::size_t grid_bytes(const Seen& seen, index_t heads,
                                              const row_cut& cut) noexcept {
    if (cut.parts == 1) return 0;
    using memory = typename Seen::memory;
    const scores_view<memory> rows(nullptr, {seen.sequences(), heads, seen.capacity()});
    arena count;
    (void)grid_descent<Bins, memory>::take(count, rows, cut);
    return count.bytes();
  }
};

}  // namespace refreekv::inline v0::cuda_detail
