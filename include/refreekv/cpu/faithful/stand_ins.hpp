// SPDX-License-Identifier: Apache-2.0
// Stand-ins for dropped tokens on the CPU: fits them, and writes them into a cache.
#pragma once

#include "refreekv/cpu/faithful/size_errors.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

template <class Layer>
importance_scratch carve_importance_scratch(arena& from, index_t workers,
                                            const importance_rule& rule,
                                            const Layer& layer) noexcept {
  importance_scratch s{};
  s.normalisers = from.array<row_normaliser>(layer.sequences(), layer.q_heads(), rule.rows);
  if (rule.error_term) {
    s.errors = from.array<double>(layer.sequences(), layer.kv_heads(), index_t{rule.sizes} + 1);
  }
  arena weighing, fitting;
  (void)importance_scratch::carve_weighing(weighing, rule, layer);
  if (rule.error_term || rule.stand_ins) (void)fitting_parts::carve(fitting, rule, layer);
  s.worker_bytes = whole_lines((std::max)(weighing.bytes(), fitting.bytes()));
  arena sorted;
  (void)sorted.array<float>(layer.sequences(), layer.kv_heads(), layer.capacity());
  arena all;
  (void)all.array<std::byte>(workers, s.worker_bytes);
  s.memory = from.array<std::byte>((std::max)(sorted.bytes(), all.bytes()));
  return s;
}

template <class Executor, class Layer>
void fit_stand_ins(const Executor& threads, const importance_rule& rule, const Layer& layer,
                   const view<const grade, 3>& grades, const position_t* sizes,
                   const stand_in_rows<>& to, const importance_scratch& scratch) noexcept {
  for (index_t s = 0; s < layer.sequences(); ++s) {
    const query_window window = window_of(detail::plain(layer), s, rule.rows);
    index_t most = 0;
    for (index_t h = 0; h < layer.kv_heads(); ++h) {
      to.counts(s, h) =
          static_cast<position_t>(stand_ins_of(rule, window, grades.at(s, h), sizes[s]));
      most = (std::max)(most, index_t{to.counts(s, h)});
    }
    for (index_t h = 0; rule.scope == cut_scope::layer && h < layer.kv_heads(); ++h) {
      to.counts(s, h) = static_cast<position_t>(most);
    }
  }
  for_each_head(threads, layer.shape(), attention_work(detail::plain(layer), rule.rows),
                [&](int worker, index_t s, index_t h) {
                  if (to.counts(s, h) == 0) return;
                  graded_head(rule, layer, s, h, scratch, worker, grades.at(s, h))
                      .write_stand_ins(sizes[s], to.counts(s, h), to);
                });
}

/// Writes stand-ins, rows [sequence, kv_head, stand_in, dim], next to the tokens that a compaction
/// kept. Rounds them to the source's type.
template <class Executor, kv_source Source>
void write_stand_ins(const Executor& threads, const Source& source,
                     const view<const kept_tokens, 2>& kept, const view<const float, 4>& rows,
                     const view<const position_t, 2>& counts, compaction mode) noexcept {
  using element_type = typename Source::element_type;
  static_assert(element<element_type>, "stand-ins are float, half or bfloat16, as the cache is");
  for_each_head(threads, source.shape(), source.shape().head_dim / 32 + 1,
                [&](int, index_t s, index_t h) {
                  const index_t first = first_stand_in(kept(s, h), counts(s, h), mode);
                  for (index_t i = 0; i < counts(s, h); ++i) {
                    const auto run = source.run_at(s, h, first + i);
                    const float* row = rows.at(s, h, i);
                    for (index_t d = 0; d < source.shape().head_dim; ++d) {
                      run.data[d * run.dim_stride] = narrow<element_type>(row[d]);
                    }
                  }
                });
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
