// SPDX-License-Identifier: Apache-2.0
// Sharing a sequence's quota out among its KV heads, on a device: the descent of grid_limit.hpp,
// with one limit for the scores of all heads.
#pragma once

#include "refreekv/cuda/top_tokens.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The scores of all heads may be more than 32 bits count.
template <class Memory>
using sharing_scratch = grid_descent<count_bins_of<std::uint64_t>, Memory>;

template <class Seen>
[[nodiscard]] sharing_scratch<typename Seen::memory> take_sharing_scratch(
    arena& from, const Seen& seen, const row_cut& cut) noexcept {
  using memory = typename Seen::memory;
  const scores_view<memory> rows(nullptr, {seen.sequences(), seen.kv_heads(), seen.capacity()});
  return sharing_scratch<memory>::take(from, rows, cut, seen.kv_heads());
}
/// Each block sums what the parts of all heads left, so these are cut in fewer the more there are.
template <class Seen>
[[nodiscard]] auto take_sharing_scratch(arena& from, const Seen& seen) noexcept {
  const index_t heads = seen.kv_heads();
  const index_t most = heads < row_cut::most_parts ? row_cut::most_parts / heads : 1;
  return take_sharing_scratch(from, seen,
                              row_cut::of(seen.sequences() * heads, seen.capacity(), most));
}

/// The first launch: weighs the parts by the first digit.
template <class Seen>
struct rank_heads_body {
  using memory = typename Seen::memory;
  using bins = count_bins_of<std::uint64_t>;
  using shared = limit_memory<bins>;
  const token_quota* quotas;
  Seen seen;
  sharing_scratch<memory> descent;

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const cut_rows<memory>& rows = descent.rows;
    const index_t row = item / rows.cut.parts, part = item % rows.cut.parts;
    const index_t sequence = row / seen.kv_heads();
    const token_quota quota = quotas[sequence];
    row_tokens tokens{candidates_of(seen, sequence, quota.recent), seen.tokens(sequence)};
    const bool all = quota.ranked >= tokens.candidates;
    if (all) tokens.candidates = 0;
    if (block.rank() == 0) {
      if (part == 0) rows.tokens[row] = tokens;
      rows.limits[item] = value_limit::nothing();
    }
    const auto ranked = static_cast<std::uint64_t>(all ? 0 : quota.ranked * seen.kv_heads());
    descent.weigh(block, s, item, rows.cut.part(part, tokens.candidates), {bins{}, {0, ranked, 0}},
                  0);
  }
};

/// The last launch: sums what the parts of a head have of the best, those with NaN none.
template <class Seen>
struct assign_share {
  using memory = typename Seen::memory;
  double floor;
  const token_quota* quotas;
  Seen seen;
  cut_rows<memory> rows;
  token_quota* shared;

  /// row: [sequence, kv_head]
  REFREEKV_HOST_DEVICE void operator()(index_t row) const noexcept {
    const token_quota quota = quotas[row / seen.kv_heads()];
    const index_t candidates = rows.tokens[row].candidates;
    if (candidates == 0) {
      shared[row] = quota;
      return;
    }
    index_t best = 0;
    for (index_t part = 0; part < rows.cut.used(candidates); ++part) {
      const position_t count = rows.counts[row * rows.cut.parts + part];
      best += count > 0 ? count : 0;
    }
    shared[row] = quota.of_head(floor, best);
  }
};

template <class Backend, class Seen>
[[nodiscard]] status share_quotas(const Backend& on, double floor, const token_quota* quotas,
                                  const Seen& seen,
                                  const scores_view<typename Seen::memory>& scores,
                                  token_quota* shared,
                                  sharing_scratch<typename Seen::memory> descent) noexcept {
  descent.rows.scores = scores;
  const rank_heads_body<Seen> first{quotas, seen, descent};
  status s = run_blocks(on, descent.rows.items(), first);
  if (s == status::ok) {
    s = find_on_grid(on, descent, grid_keep<typename Seen::memory>{descent.rows, 1, {}});
  }
  if (s != status::ok) return s;
  using assign = assign_share<Seen>;
  const index_t rows = seen.sequences() * seen.kv_heads();
  const assign last{floor, quotas, seen, descent.rows, shared};
  return run_blocks(on, blocks_for(rows), for_each_body<assign>{rows, last});
}

}  // namespace refreekv::inline v0::cuda_detail
