// SPDX-License-Identifier: Apache-2.0
// The CPU backend, built on Eigen.
#pragma once

#if (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || defined(_M_FP_FAST)
#error \
    "refreekv decides on NaN and Inf: compile the files that include it without -ffast-math (/fp:fast), or with -fno-finite-math-only behind it"
#endif

#include "refreekv/backend/backend.hpp"
#include "refreekv/cpu/compact.hpp"
#include "refreekv/cpu/faithful/stand_ins.hpp"
#include "refreekv/cpu/key_index.hpp"
#include "refreekv/cpu/norm_scan.hpp"
#include "refreekv/cpu/pages.hpp"
#include "refreekv/cpu/ranked_scan.hpp"

namespace refreekv::inline v0 {

inline namespace REFREEKV_TARGET {

/// The CPU backend; it runs on the threads of an executor. `cpu_backend{}` uses the calling thread.
/// `cpu_backend{4}` owns a thread_pool of four threads, the calling one included.
/// `cpu_backend{pool}` refers to an executor that must outlive it. Threads may share a backend if
/// its executor allows that; the library's executors do.
/// Elements are float, Eigen::half, Eigen::bfloat16, f16_bits and bf16_bits. Keys may also be
/// scaled_keys of int8 or fp8_e4m3_bits, block_keys and int4_keys.
template <class Executor = single_thread>
  requires executor<std::remove_reference_t<Executor>>
struct cpu_backend {
  Executor threads{};
};
cpu_backend() -> cpu_backend<>;
cpu_backend(int) -> cpu_backend<thread_pool>;
template <class Executor>
cpu_backend(Executor&&) -> cpu_backend<Executor>;

}  // namespace REFREEKV_TARGET

template <class Executor>
struct ops<cpu_backend<Executor>> {
  using memory = host_memory;
  using backend_type = cpu_backend<Executor>;
  using scan_scratch = cpu_detail::scan_scratch;
  using attention_scratch = cpu_detail::attention_scratch;
  using selection_scratch = cpu_detail::selection_scratch;
  using sharing_scratch = float*;
  struct ranking_scratch {};
  using importance_scratch = cpu_detail::importance_scratch;

  template <class Layer>
  static scan_scratch carve_scan_scratch(arena& from, const backend_type& b, const norm_scan& scan,
                                         const Layer& layer) noexcept {
    return scan_scratch::carve(from, b.threads.workers(), scan, layer);
  }

  static status read_chunks(const backend_type& b, const auto&... arguments) noexcept {
    cpu_detail::read_chunks(b.threads, arguments...);
    return status::ok;
  }
  static status normalise_rows(const backend_type& b, const auto&... arguments) noexcept {
    cpu_detail::normalise_rows(b.threads, arguments...);
    return status::ok;
  }
  static status norm_curve(const backend_type& b, const auto&... arguments) noexcept {
    cpu_detail::norm_curve(b.threads, arguments...);
    return status::ok;
  }
  static status crossing_curve(const backend_type& b, const auto&... arguments) noexcept {
    cpu_detail::crossing_curve(b.threads, arguments...);
    return status::ok;
  }

  template <class Layer>
  static status find_cuts(const backend_type&, const norm_scan& scan, const Layer& layer,
                          const norm_scan_buffers& buffers, view<kept_range, 2> kept) noexcept {
    const index_t groups = kept.extent(1);
    for (index_t i = 0; i < layer.sequences() * groups; ++i) {
      kept(i / groups, i % groups) = detail::stop(
          scan, layer.tokens(i / groups), buffers.norms + i * buffers.chunks,
          buffers.chunk_norms + i * chunk_tokens, buffers.chunk_masses + i * chunk_tokens);
    }
    return status::ok;
  }

  template <class F>
  static status for_each_sequence(const backend_type&, index_t sequences, const F& f) noexcept {
    for (index_t s = 0; s < sequences; ++s) f(s);
    return status::ok;
  }

  template <kv_source Source>
  static status compact(const backend_type& b, const Source& source, view<const kept_range, 2> kept,
                        compaction mode) noexcept {
    const index_t kv_heads = source.shape().kv_heads;
    const auto own_move = [&](index_t i) {
      return move_of(kept(i / kv_heads, kept.extent(1) == 1 ? 0 : i % kv_heads), mode);
    };
    const index_t items = source.shape().sequences * kv_heads;
    index_t tokens = 0;
    for (index_t i = 0; i < items; ++i) tokens += own_move(i).tokens;
    for_each_item(b.threads, items, tokens * source.shape().head_dim, [&](int, index_t i) {
      cpu_detail::move_rows(source, i / kv_heads, i % kv_heads, own_move(i));
    });
    return status::ok;
  }

  template <kv_source Source>
  static status compact(const backend_type& b, const Source& source, const kept_positions<>& kept,
                        compaction mode) noexcept {
    cpu_detail::for_each_head(
        b.threads, source.shape(), source.shape().head_dim,
        [&](int, index_t s, index_t h) { cpu_detail::gather_rows(source, s, h, kept, mode); });
    return status::ok;
  }

  template <class Layer>
  static attention_scratch carve_attention_scratch(arena& from, const backend_type& b, index_t rows,
                                                   const Layer& layer) noexcept {
    return attention_scratch::carve(from, b.threads.workers(), rows, layer);
  }

  template <class Layer>
  static selection_scratch carve_selection_scratch(arena& from, const backend_type& b,
                                                   const Layer& layer) noexcept {
    return selection_scratch::carve(from, cpu_detail::head_workers(b.threads, layer), layer);
  }

  template <class Layer>
  static ranking_scratch carve_ranking_scratch(arena&, const backend_type&, const Layer&) noexcept {
    return {};
  }

  template <class Layer>
  static status attention_sums(const backend_type& b, const score_rows& rows, const Layer& layer,
                               const scores_view<>& scores, const view<kept_tokens, 2>& counts,
                               const attention_scratch& scratch) noexcept {
    cpu_detail::attention_sums(b.threads, rows, layer, scores, counts, scratch);
    return status::ok;
  }

  template <class Layer>
  static status attention_spread(const backend_type& b, index_t rows, index_t recent, double gain,
                                 const Layer& layer, const scores_view<>& scores,
                                 const view<kept_tokens, 2>& counts, double* totals,
                                 const attention_scratch& scratch) noexcept {
    cpu_detail::attention_spread(b.threads, rows, recent, gain, layer, scores, counts, totals,
                                 scratch);
    return status::ok;
  }

  template <class Layer>
  static status pool(const backend_type& b, const pooling& mode, const token_quota* quotas,
                     const Layer& layer, const scores_view<>& scores,
                     const scores_view<>& pooled) noexcept {
    cpu_detail::pool(b.threads, mode, quotas, layer, scores, pooled);
    return status::ok;
  }

  template <class Layer>
  static status keep_all(const backend_type& b, const Layer& layer,
                         const kept_positions<>& kept) noexcept {
    cpu_detail::for_each_head(b.threads, layer.shape(), 1, [&](int, index_t s, index_t h) {
      cpu_detail::keep_all(kept, s, h, layer.tokens(s));
    });
    return status::ok;
  }

  template <class Layer>
  static sharing_scratch carve_sharing_scratch(arena& from, const backend_type&,
                                               const Layer& layer) noexcept {
    return from.array<float>(layer.sequences(), layer.kv_heads(), layer.capacity());
  }
  static status share_quotas(const backend_type& b, const auto&... arguments) noexcept {
    cpu_detail::share_quotas(b.threads, arguments...);
    return status::ok;
  }

  template <class Layer>
  static status top_tokens(const backend_type& b, const quotas_view<>& quotas, const Layer& layer,
                           const scores_view<>& scores, const kept_positions<>& kept,
                           const selection_scratch& scratch) noexcept {
    cpu_detail::top_tokens(b.threads, quotas, layer, scores, kept, scratch);
    return status::ok;
  }

  template <class Layer>
  static status top_mass(const backend_type& b, double share, bool sink_start, const Layer& layer,
                         const scores_view<>& scores, const kept_positions<>& kept,
                         const selection_scratch& scratch) noexcept {
    cpu_detail::top_mass(b.threads, share, sink_start, layer, scores, kept, scratch);
    return status::ok;
  }

  template <class Layer>
  static status rank_tokens(const backend_type& b, index_t recent, const Layer& layer,
                            const scores_view<>& scores, const scores_view<>& weights,
                            position_t* order, double* norms, const ranking_scratch&) noexcept {
    cpu_detail::rank_tokens(b.threads, recent, layer, scores, weights, order, norms);
    return status::ok;
  }

  template <class Layer>
  static status stop_ranked(const backend_type& b, double threshold, index_t recent,
                            const Layer& layer, const double* norms, position_t* order,
                            const kept_positions<>& kept, const ranking_scratch&) noexcept {
    cpu_detail::stop_ranked(b.threads, threshold, recent, layer, norms, order, kept);
    return status::ok;
  }

  template <class Layer>
  static status select_pages(const backend_type& b, const page_bounds<>& pages, index_t tokens,
                             const Layer& layer, const scores_view<>& scores,
                             const selection_scratch& scratch) noexcept {
    cpu_detail::select_pages(b.threads, pages, tokens, layer, scores, scratch);
    return status::ok;
  }

  template <class Layer>
  static importance_scratch carve_importance_scratch(arena& from, const backend_type& b,
                                                     const importance_rule& rule,
                                                     const Layer& layer) noexcept {
    return cpu_detail::carve_importance_scratch(from, cpu_detail::head_workers(b.threads, layer),
                                                rule, layer);
  }

  // Primitives of policy::faithful; see the headers in cpu/faithful.
  static status weigh_tokens(const backend_type& b, const auto&... arguments) noexcept {
    cpu_detail::weigh_tokens(b.threads, arguments...);
    return status::ok;
  }
  static status grade_tokens(const backend_type& b, const auto&... arguments) noexcept {
    cpu_detail::grade_tokens(b.threads, arguments...);
    return status::ok;
  }
  template <class Layer>
  static status find_sizes(const backend_type& b, const importance_rule& rule, const Layer& layer,
                           const view<const grade, 3>& grades, const double* lost,
                           position_t* sizes, const stand_in_rows<>&,
                           const importance_scratch& scratch) noexcept {
    cpu_detail::find_sizes(b.threads, rule, layer, grades, lost, sizes, scratch);
    return status::ok;
  }
  static status fit_stand_ins(const backend_type& b, const auto&... arguments) noexcept {
    cpu_detail::fit_stand_ins(b.threads, arguments...);
    return status::ok;
  }
  static status keep_grades(const backend_type& b, const auto&... arguments) noexcept {
    cpu_detail::keep_grades(b.threads, arguments...);
    return status::ok;
  }
  static status write_stand_ins(const backend_type& b, const auto&... arguments) noexcept {
    cpu_detail::write_stand_ins(b.threads, arguments...);
    return status::ok;
  }

  template <kv_source Keys>
  static status quantise(const backend_type& b, const Keys& keys, const lengths_view<>& from,
                         const int4_keys<>& to) noexcept {
    cpu_detail::quantise(b.threads, keys, from, to);
    return status::ok;
  }

  template <kv_source Keys>
  static status bound_pages(const backend_type& b, const Keys& keys, const lengths_view<>& from,
                            const page_bounds<>& to) noexcept {
    cpu_detail::bound_pages(b.threads, keys, from, to);
    return status::ok;
  }

  template <class T>
  static status write_masks(const backend_type& b, view<const kept_range, 2> kept, view<T, 3> mask,
                            T keep, T drop) noexcept {
    cpu_detail::write_masks(b.threads, kept, mask, keep, drop);
    return status::ok;
  }

  template <class T>
  static status write_masks(const backend_type& b, const kept_positions<>& kept, view<T, 3> mask,
                            T keep, T drop) noexcept {
    cpu_detail::write_masks(b.threads, kept, mask, keep, drop);
    return status::ok;
  }

  static status plan_pages(const backend_type&, view<const kept_range, 2> kept, index_t page_tokens,
                           const shared_pages_view<>& shared, const page_plans<>& to) noexcept {
    cpu_detail::plan_pages(kept, page_tokens, shared, to);
    return status::ok;
  }

  template <class Index>
  static status release_pages(const backend_type& b, view<const page_plan, 1> plans,
                              const shared_pages_view<>& shared, const page_lists<Index>& table,
                              const page_lists<Index>& freed) noexcept {
    cpu_detail::release_pages(b.threads, plans, shared, table, freed);
    return status::ok;
  }
};

}  // namespace refreekv::inline v0
