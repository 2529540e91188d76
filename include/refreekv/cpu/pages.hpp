// SPDX-License-Identifier: Apache-2.0
// Writes masks, and plans and releases pages, of a batch on the CPU.
#pragma once

#include <algorithm>

#include "refreekv/cpu/executor.hpp"
#include "refreekv/cpu/simd/target.hpp"
#include "refreekv/decision/kept_positions.hpp"
#include "refreekv/decision/page_lists.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Calls f(sequence, group) for each row of a mask [sequence, group, token].
template <class Executor, class T, class F>
void for_each_row(const Executor& threads, const view<T, 3>& mask, const F& f) noexcept {
  const index_t groups = mask.extent(1), rows = mask.extent(0) * groups;
  for_each_item(threads, rows, rows * mask.extent(2),
                [&](int, index_t i) { f(i / groups, i % groups); });
}

template <class Executor, class T>
void write_masks(const Executor& threads, const view<const kept_range, 2>& kept,
                 const view<T, 3>& mask, T keep, T drop) noexcept {
  for_each_row(threads, mask, [&](index_t s, index_t g) {
    const kept_range& k = kept(s, g);
    T* row = mask.at(s, g);
    write_mask(k, row, keep, drop);
    std::fill(row + k.tokens, row + mask.extent(2), drop);
  });
}

template <class Executor, class T>
void write_masks(const Executor& threads, const kept_positions<>& kept, const view<T, 3>& mask,
                 T keep, T drop) noexcept {
  for_each_row(threads, mask, [&](index_t s, index_t h) {
    T* row = mask.at(s, h);
    std::fill_n(row, mask.extent(2), drop);
    for (index_t i = 0; i < kept.counts(s, h).count; ++i) row[kept.positions(s, h, i)] = keep;
  });
}

inline void plan_pages(const view<const kept_range, 2>& kept, index_t page_tokens,
                       const shared_pages_view<>& shared, const page_plans<>& to) noexcept {
  for (index_t s = 0; s < kept.extent(0); ++s) {
    const kept_range k = kept(s, 0);
    const page_plan plan =
        refreekv::plan_pages(k, page_tokens, refreekv::detail::shared_by(shared, s));
    to.plans(s) = plan;
    to.compact_ranges(s, 0) = refreekv::detail::sink_moves(k, plan);
    to.mask_ranges(s, 0) = kept_slots(k, plan, page_tokens);
  }
}

template <class Executor, class Index>
void release_pages(const Executor& threads, const view<const page_plan, 1>& plans,
                   const shared_pages_view<>& shared, const page_lists<Index>& table,
                   const page_lists<Index>& freed) noexcept {
  const index_t sequences = plans.extent(0);
  for_each_item(threads, sequences, sequences * table.ids.extent(1), [&](int, index_t s) {
    const page_plan& plan = plans(s);
    freed.counts(s) = static_cast<position_t>(remove_pages(plan, table.ids.at(s), table.counts(s),
                                                           freed.ids.at(s),
                                                           refreekv::detail::shared_by(shared, s)));
    table.counts(s) -= static_cast<position_t>(plan.last - plan.first);
  });
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
