// SPDX-License-Identifier: Apache-2.0
// The norm scan on the CPU: the curve over chunks, then the curve inside the crossing chunk.
#pragma once

#include "refreekv/cpu/executor.hpp"
#include "refreekv/cpu/scanner.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// The chunks of a sequence that this rank reads: all of them, or on a shard the local ones.
template <class Layer>
struct chunks_here {
  const Layer& layer;
  index_t sequence;
  chunking chunks;

  [[nodiscard]] index_t count() const noexcept {
    if constexpr (sharded_layer<Layer>) {
      return layer.keys.local_chunks(sequence, chunks);
    } else {
      return chunks.count();
    }
  }
  [[nodiscard]] index_t operator[](index_t i) const noexcept {
    if constexpr (sharded_layer<Layer>) {
      return layer.keys.local_chunk(sequence, chunks, i);
    } else {
      return i;
    }
  }
};

/// Calls f(worker, chunk, next) for every local chunk of every KV head. Each worker gets
/// consecutive chunks, about the same number as the others; `next` is its next chunk, or `chunk`
/// again after the last one. The KV heads of a chunk come one after the other: a cache in which a
/// token's heads are adjacent is then read sequentially.
template <class Executor, class Layer, class F>
void for_each_chunk(const Executor& threads, const Layer& layer, index_t sinks,
                    const F& f) noexcept {
  const index_t kv_heads = layer.kv_heads();
  const auto chunks_of = [&](index_t sequence) {
    return chunks_here<Layer>{layer, sequence, {layer.tokens(sequence), sinks}};
  };
  const auto items = [&](index_t sequence) { return chunks_of(sequence).count() * kv_heads; };
  index_t total = 0;
  for (index_t s = 0; s < layer.sequences(); ++s) total += items(s);
  for_each_range(threads, total, [&](int worker, index_t begin, index_t end) {
    index_t sequence = 0, first = 0;  // first item of `sequence`
    const auto at = [&](index_t i) {
      while (i - first >= items(sequence)) first += items(sequence++);
      return chunk_index{sequence, chunks_of(sequence)[(i - first) / kv_heads],
                         (i - first) % kv_heads};
    };
    chunk_index chunk = at(begin);
    for (index_t i = begin; i < end; ++i) {
      const chunk_index next = i + 1 < end ? at(i + 1) : chunk;
      f(worker, chunk, next);
      chunk = next;
    }
  });
}

/// On a shard, zeroes `statistics`, so that the chunks of other ranks are 0.
template <class Layer>
void clear_statistics(const norm_scan& scan, const Layer& layer,
                      const norm_scan_buffers& buffers) noexcept {
  if constexpr (sharded_layer<Layer>) {
    const index_t rows = layer.sequences() * layer.q_heads() * scan.window;
    std::fill_n(buffers.statistics, rows * buffers.chunks, chunk_statistics{});
  }
}

template <class Executor, class Layer>
void read_chunks(const Executor& threads, const norm_scan& scan, const Layer& layer,
                 const norm_scan_buffers& buffers, const scan_scratch& scratch) noexcept {
  const scanner<Layer> scanner(scan, layer, buffers, scratch);
  const index_t q_heads = layer.q_heads(), all_heads = layer.sequences() * q_heads;
  if constexpr (has_queries<Layer>) {
    for_each_item(threads, all_heads, all_heads * scan.window * layer.head_dim(),
                  [&](int, index_t i) { scanner.pack(i / q_heads, i % q_heads); });
  }
  clear_statistics(scan, layer, buffers);
  for_each_chunk(threads, layer, scan.sinks, [&](int worker, const auto& chunk, const auto& next) {
    scanner.read_chunk(worker, chunk, next);
  });
}

template <class Executor, class Layer>
void normalise_rows(const Executor& threads, const norm_scan& scan, const Layer& layer,
                    const norm_scan_buffers& buffers, const scan_scratch& scratch) noexcept {
  const scanner<Layer> scanner(scan, layer, buffers, scratch);
  const index_t q_heads = layer.q_heads(), all_heads = layer.sequences() * q_heads;
  for_each_item(threads, all_heads, all_heads * scan.window * buffers.chunks,
                [&](int, index_t i) { scanner.normalise_rows(i / q_heads, i % q_heads); });
  if (scan.one_pass()) return;
  clear_statistics(scan, layer, buffers);
  for_each_chunk(threads, layer, scan.sinks, [&](int worker, const auto& chunk, const auto& next) {
    scanner.read_chunk_again(worker, chunk, next);
  });
}

template <class Executor, class Layer>
void norm_curve(const Executor& threads, const norm_scan& scan, const Layer& layer,
                const norm_scan_buffers& buffers, const scan_scratch& scratch) noexcept {
  const scanner<Layer> scanner(scan, layer, buffers, scratch);
  const index_t q_heads = layer.q_heads(), all_heads = layer.sequences() * q_heads;
  const index_t groups = scan.groups(layer.kv_heads());
  const index_t heads = q_heads / groups;  // query heads per group
  for_each_item(threads, layer.sequences() * groups, all_heads * scan.window * buffers.chunks,
                [&](int, index_t i) {
                  double* norms = buffers.norms + i * buffers.chunks;
                  std::fill(norms, norms + buffers.chunks, 0.0);
                  for (index_t h = 0; h < heads; ++h) {
                    scanner.add_norms(i / groups, i % groups * heads + h, norms);
                  }
                });
}

template <class Executor, class Layer>
void crossing_curve(const Executor& threads, const norm_scan& scan, const Layer& layer,
                    const norm_scan_buffers& buffers, const scan_scratch& scratch) noexcept {
  const scanner<Layer> scanner(scan, layer, buffers, scratch);
  const index_t groups = scan.groups(layer.kv_heads());
  const index_t kv_heads = layer.kv_heads() / groups;  // KV heads per group
  const index_t values = layer.sequences() * layer.q_heads() * scan.window * chunk_tokens;
  for_each_item(threads, layer.sequences() * groups, 8 * values, [&](int worker, index_t i) {
    const index_t sequence = i / groups;
    const index_t chunks = scanner.chunks_of(sequence).count();
    const double* norms = buffers.norms + i * buffers.chunks;
    double* chunk_norms = buffers.chunk_norms + i * chunk_tokens;
    float* chunk_masses = buffers.chunk_masses + i * chunk_tokens;
    std::fill(chunk_norms, chunk_norms + chunk_tokens, 0.0);
    std::fill(chunk_masses, chunk_masses + chunk_tokens, 0.0f);
    if (!scan.decides(layer.tokens(sequence), norms)) return;
    const index_t crossing = scan.crossing(norms, chunks);
    if (!detail::has_chunk_at(layer, sequence, scanner.chunks_of(sequence)[crossing].begin)) return;
    for (index_t h = 0; h < kv_heads; ++h) {
      scanner.add_chunk_norms(worker, {sequence, crossing, i % groups * kv_heads + h}, chunk_norms,
                              chunk_masses);
    }
  });
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
