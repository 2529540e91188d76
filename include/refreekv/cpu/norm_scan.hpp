// SPDX-License-Identifier: Apache-2.0
// The norm scan on the CPU: the curve over chunks, then the curve inside the crossing chunk.
#pragma once

#include "refreekv/cpu/executor.hpp"
#include "refreekv/cpu/scanner.hpp"

namespace refreekv::inline v0::cpu_detail {

/// Folds partial [sequence, kv_head, n] into [sequence, group, n] in place.
template <class Fold>
void fold_groups(double* partial, index_t sequences, index_t kv_heads, index_t groups, index_t n,
                 const Fold& fold) noexcept {
  if (groups == kv_heads) return;
  for (index_t s = 0; s < sequences; ++s) {
    const double* from = partial + s * kv_heads * n;
    double* to = partial + s * n;  // never ahead of `from`
    for (index_t i = 0; i < n; ++i) to[i] = from[i];
    for (index_t h = 1; h < kv_heads; ++h) {
      for (index_t i = 0; i < n; ++i) to[i] = fold(to[i], from[h * n + i]);
    }
  }
}

template <class Executor, class Seen>
void norm_curve(const Executor& on, const norm_scan& scan, const Seen& seen,
                const norm_scan_buffers& buffers, const scan_scratch& scratch) noexcept {
  const scanner<Seen> scanner(scan, seen, buffers, scratch);
  const index_t kv_heads = seen.kv_heads(), q_heads = seen.q_heads();
  const index_t heads = q_heads / kv_heads;  // of a KV head

  if constexpr (requires { seen.queries; }) {
    for_each_item(on, seen.sequences() * q_heads, [&](int, index_t i) {
      pack_queries(seen, i / q_heads, i % q_heads, scan.window,
                   scratch.queries + i * scan.window * seen.head_dim());
    });
  }
  const auto for_each_chunk = [&](const auto& f) {
    for_each_item(on, seen.sequences() * kv_heads * buffers.chunks, [&](int worker, index_t i) {
      const index_t chunk = i % buffers.chunks, head = i / buffers.chunks;
      const index_t sequence = head / kv_heads;
      if (chunk < scanner.chunks_of(sequence).count()) f(worker, sequence, head % kv_heads, chunk);
    });
  };
  for_each_chunk([&](int worker, index_t sequence, index_t kv_head, index_t chunk) {
    scanner.read_chunk(worker, sequence, kv_head, chunk);
  });
  for_each_item(on, seen.sequences() * q_heads, [&](int, index_t i) {
    if constexpr (requires { seen.queries; }) scanner.normalise_rows(i / q_heads, i % q_heads);
    if (scan.one_pass()) scanner.energies_from_statistics(i / q_heads, i % q_heads);
  });
  if (!scan.one_pass()) {
    for_each_chunk([&](int worker, index_t sequence, index_t kv_head, index_t chunk) {
      scanner.energies_from_chunk(worker, sequence, kv_head, chunk);
    });
  }
  for_each_item(on, seen.sequences() * kv_heads, [&](int, index_t i) {
    double* norms = buffers.norms + i * buffers.chunks;
    std::fill(norms, norms + buffers.chunks, 0.0);
    for (index_t g = 0; g < heads; ++g) {
      scanner.add_norms(i / kv_heads, i % kv_heads * heads + g, norms);
    }
  });
  fold_groups(buffers.norms, seen.sequences(), kv_heads, scan.groups(kv_heads), buffers.chunks,
              [](double a, double b) { return a + b; });
}

template <class Executor, class Seen>
void crossing_curve(const Executor& on, const norm_scan& scan, const Seen& seen,
                    const norm_scan_buffers& buffers, const scan_scratch& scratch) noexcept {
  const scanner<Seen> scanner(scan, seen, buffers, scratch);
  const index_t kv_heads = seen.kv_heads();
  const index_t groups = scan.groups(kv_heads);
  for_each_item(on, seen.sequences() * kv_heads, [&](int worker, index_t i) {
    const index_t sequence = i / kv_heads, kv_head = i % kv_heads;
    const index_t chunks = scanner.chunks_of(sequence).count();
    const double* norms =
        buffers.norms + (sequence * groups + kv_head * groups / kv_heads) * buffers.chunks;
    double* chunk_norms = buffers.chunk_norms + i * chunk_tokens;
    double* chunk_masses = buffers.chunk_masses + i * chunk_tokens;
    std::fill(chunk_norms, chunk_norms + chunk_tokens, 0.0);
    std::fill(chunk_masses, chunk_masses + chunk_tokens, 0.0);
    if (chunks == 1 || !norm_scan::decidable(norms[1])) return;
    scanner.add_chunk_norms(worker, sequence, kv_head, scan.crossing(norms, chunks), chunk_norms,
                            chunk_masses);
  });
  fold_groups(buffers.chunk_norms, seen.sequences(), kv_heads, groups, chunk_tokens,
              [](double a, double b) { return a + b; });
  fold_groups(buffers.chunk_masses, seen.sequences(), kv_heads, groups, chunk_tokens,
              [](double a, double b) { return std::max(a, b); });
}

}  // namespace refreekv::inline v0::cpu_detail
