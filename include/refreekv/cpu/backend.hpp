// SPDX-License-Identifier: Apache-2.0
// The CPU backend on Eigen.
#pragma once

#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "refreekv decides on NaN and Inf: compile the files that include it without -ffast-math"
#endif

#include "refreekv/backend.hpp"
#include "refreekv/cpu/compact.hpp"
#include "refreekv/cpu/executor.hpp"
#include "refreekv/cpu/norm_scan.hpp"

namespace refreekv::inline v0 {

/// Where the CPU's work runs: `cpu_backend{}` on the calling thread, `cpu_backend{4}` on four
/// threads of its own (see thread_pool), `cpu_backend{pool}` on an executor that must outlive it.
/// Elements are float, Eigen::half, Eigen::bfloat16, f16_bits and bf16_bits.
template <class Executor = single_thread>
  requires executor<std::remove_reference_t<Executor>>
struct cpu_backend {
  Executor on{};
};
cpu_backend() -> cpu_backend<>;
cpu_backend(int) -> cpu_backend<thread_pool>;
template <class Executor>
cpu_backend(Executor&&) -> cpu_backend<Executor>;

template <class Executor>
struct ops<cpu_backend<Executor>> {
  using memory = host_memory;
  using backend_type = cpu_backend<Executor>;
  using scan_scratch = cpu_detail::scan_scratch;

  template <class Seen>
  static scan_scratch take_scan_scratch(arena& from, const backend_type& b, const norm_scan& scan,
                                        const Seen& seen) noexcept {
    return scan_scratch::take(from, b.on.workers(), scan, seen);
  }

  template <class Seen>
  static status norm_curve(const backend_type& b, const norm_scan& scan, const Seen& seen,
                           const norm_scan_buffers& buffers, const scan_scratch& scratch) noexcept {
    cpu_detail::norm_curve(b.on, scan, seen, buffers, scratch);
    return status::ok;
  }

  template <class Seen>
  static status crossing_curve(const backend_type& b, const norm_scan& scan, const Seen& seen,
                               const norm_scan_buffers& buffers,
                               const scan_scratch& scratch) noexcept {
    cpu_detail::crossing_curve(b.on, scan, seen, buffers, scratch);
    return status::ok;
  }

  template <class Seen>
  static status find_cuts(const backend_type&, const norm_scan& scan, const Seen& seen,
                          const norm_scan_buffers& buffers, view<kept_range, 2> kept) noexcept {
    const index_t groups = kept.extent(1);
    for (index_t i = 0; i < seen.sequences() * groups; ++i) {
      kept(i / groups, i % groups) =
          stop(scan, seen.tokens(i / groups), buffers.norms + i * buffers.chunks,
               buffers.chunk_norms + i * chunk_tokens, buffers.chunk_masses + i * chunk_tokens);
    }
    return status::ok;
  }

  template <class Seen, class F>
  static status assign(const backend_type&, const Seen& seen, view<kept_range, 2> kept,
                       const F& f) noexcept {
    for (index_t s = 0; s < kept.extent(0); ++s) {
      for (index_t g = 0; g < kept.extent(1); ++g) kept(s, g) = f(seen.tokens(s));
    }
    return status::ok;
  }

  template <kv_source Source>
  static status compact(const backend_type& b, const Source& source, view<const kept_range, 2> kept,
                        compaction how) noexcept {
    const index_t kv_heads = source.kv_heads();
    const auto move = [&](index_t i) {
      return move_of(kept(i / kv_heads, kept.extent(1) == 1 ? 0 : i % kv_heads), how);
    };
    const index_t items = source.sequences() * kv_heads;
    index_t tokens = 0;
    for (index_t i = 0; i < items; ++i) tokens += move(i).tokens;
    for_each_item(b.on, items, tokens * source.head_dim(), [&](int, index_t i) {
      cpu_detail::move_rows(source, i / kv_heads, i % kv_heads, move(i));
    });
    return status::ok;
  }
};

}  // namespace refreekv::inline v0
