// SPDX-License-Identifier: Apache-2.0
// The norm scan on the CPU: the curve over chunks, then the curve inside the crossing chunk.
#pragma once

#include "refreekv/cpu/executor.hpp"
#include "refreekv/cpu/scanner.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// The chunks of a sequence that are read: all, or a shard's own.
template <class Seen>
struct chunks_here {
  const Seen& seen;
  index_t sequence;
  chunking chunks;

  [[nodiscard]] index_t count() const noexcept {
    if constexpr (sharded<Seen>) {
      return seen.keys.own_chunks(sequence, chunks);
    } else {
      return chunks.count();
    }
  }
  [[nodiscard]] index_t operator[](index_t i) const noexcept {
    if constexpr (sharded<Seen>) {
      return seen.keys.own_chunk(sequence, chunks, i);
    } else {
      return i;
    }
  }
};

/// Calls f(worker, chunk, next) for every chunk that is here of every KV head; each worker has
/// consecutive ones of about the same number, `next` is its next one. The KV heads of a chunk
/// follow each other, so that a cache in which a token's heads are neighbours is read as it lies in
/// memory.
template <class Executor, class Seen, class F>
void for_each_chunk(const Executor& on, const Seen& seen, index_t sinks, const F& f) noexcept {
  const index_t kv_heads = seen.kv_heads();
  const auto here = [&](index_t sequence) {
    return chunks_here<Seen>{seen, sequence, {seen.tokens(sequence), sinks}};
  };
  const auto items = [&](index_t sequence) { return here(sequence).count() * kv_heads; };
  index_t total = 0;
  for (index_t s = 0; s < seen.sequences(); ++s) total += items(s);
  for_each_range(on, total, [&](int worker, index_t begin, index_t end) {
    index_t sequence = 0, first = 0;  // the item that the sequence starts with
    const auto at = [&](index_t i) {
      while (i - first >= items(sequence)) first += items(sequence++);
      return chunk_index{sequence, here(sequence)[(i - first) / kv_heads], (i - first) % kv_heads};
    };
    chunk_index chunk = at(begin);
    for (index_t i = begin; i < end; ++i) {
      const chunk_index next = i + 1 < end ? at(i + 1) : chunk;
      f(worker, chunk, next);
      chunk = next;
    }
  });
}

/// Leaves zeros for the chunks of other ranks.
template <class Seen>
void clear_statistics(const norm_scan& scan, const Seen& seen,
                      const norm_scan_buffers& buffers) noexcept {
  if constexpr (sharded<Seen>) {
    const index_t rows = seen.sequences() * seen.q_heads() * scan.window;
    std::fill_n(buffers.statistics, rows * buffers.chunks, chunk_statistics{});
  }
}

template <class Executor, class Seen>
void read_chunks(const Executor& on, const norm_scan& scan, const Seen& seen,
                 const norm_scan_buffers& buffers, const scan_scratch& scratch) noexcept {
  const scanner<Seen> scanner(scan, seen, buffers, scratch);
  const index_t q_heads = seen.q_heads(), all_heads = seen.sequences() * q_heads;
  if constexpr (has_queries<Seen>) {
    for_each_item(on, all_heads, all_heads * scan.window * seen.head_dim(),
                  [&](int, index_t i) { scanner.pack(i / q_heads, i % q_heads); });
  }
  clear_statistics(scan, seen, buffers);
  for_each_chunk(on, seen, scan.sinks, [&](int worker, const auto& chunk, const auto& next) {
    scanner.read_chunk(worker, chunk, next);
  });
}

template <class Executor, class Seen>
void normalise_rows(const Executor& on, const norm_scan& scan, const Seen& seen,
                    const norm_scan_buffers& buffers, const scan_scratch& scratch) noexcept {
  const scanner<Seen> scanner(scan, seen, buffers, scratch);
  const index_t q_heads = seen.q_heads(), all_heads = seen.sequences() * q_heads;
  for_each_item(on, all_heads, all_heads * scan.window * buffers.chunks,
                [&](int, index_t i) { scanner.normalise_rows(i / q_heads, i % q_heads); });
  if (scan.one_pass()) return;
  clear_statistics(scan, seen, buffers);
  for_each_chunk(on, seen, scan.sinks, [&](int worker, const auto& chunk, const auto& next) {
    scanner.read_chunk_again(worker, chunk, next);
  });
}

template <class Executor, class Seen>
void norm_curve(const Executor& on, const norm_scan& scan, const Seen& seen,
                const norm_scan_buffers& buffers, const scan_scratch& scratch) noexcept {
  const scanner<Seen> scanner(scan, seen, buffers, scratch);
  const index_t q_heads = seen.q_heads(), all_heads = seen.sequences() * q_heads;
  const index_t groups = scan.groups(seen.kv_heads());
  const index_t heads = q_heads / groups;  // of a group
  for_each_item(on, seen.sequences() * groups, all_heads * scan.window * buffers.chunks,
                [&](int, index_t i) {
                  double* norms = buffers.norms + i * buffers.chunks;
                  std::fill(norms, norms + buffers.chunks, 0.0);
                  for (index_t h = 0; h < heads; ++h) {
                    scanner.add_norms(i / groups, i % groups * heads + h, norms);
                  }
                });
}

template <class Executor, class Seen>
void crossing_curve(const Executor& on, const norm_scan& scan, const Seen& seen,
                    const norm_scan_buffers& buffers, const scan_scratch& scratch) noexcept {
  const scanner<Seen> scanner(scan, seen, buffers, scratch);
  const index_t groups = scan.groups(seen.kv_heads());
  const index_t kv_heads = seen.kv_heads() / groups;  // of a group
  const index_t values = seen.sequences() * seen.q_heads() * scan.window * chunk_tokens;
  for_each_item(on, seen.sequences() * groups, 8 * values, [&](int worker, index_t i) {
    const index_t sequence = i / groups;
    const index_t chunks = scanner.chunks_of(sequence).count();
    const double* norms = buffers.norms + i * buffers.chunks;
    double* chunk_norms = buffers.chunk_norms + i * chunk_tokens;
    float* chunk_masses = buffers.chunk_masses + i * chunk_tokens;
    std::fill(chunk_norms, chunk_norms + chunk_tokens, 0.0);
    std::fill(chunk_masses, chunk_masses + chunk_tokens, 0.0f);
    if (!scan.decides(seen.tokens(sequence), norms)) return;
    const index_t crossing = scan.crossing(norms, chunks);
    if (!has_chunk_at(seen, sequence, scanner.chunks_of(sequence)[crossing].begin)) return;
    for (index_t h = 0; h < kv_heads; ++h) {
      scanner.add_chunk_norms(worker, {sequence, crossing, i % groups * kv_heads + h}, chunk_norms,
                              chunk_masses);
    }
  });
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
