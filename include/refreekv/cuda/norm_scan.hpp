// SPDX-License-Identifier: Apache-2.0
// The norm scan on a device: the curve over chunks, the curve inside the crossing chunk, the cut.
//
// One kernel reads the keys; the others work on three floats a chunk, and on the one chunk of each
// query head in which the loss crosses the threshold. Lengths are read by the kernels: what is
// launched depends on extents alone.
#pragma once

#include "refreekv/cuda/attend.hpp"

namespace refreekv::inline v0::cuda_detail {

/// What the norm scan works in besides norm_scan_buffers: of each query head 3 KB, and of each
/// group 64 bytes for each chunk.
struct scan_scratch {
  double* warp_norms;  ///< [sequence, group, warp, chunk]
  double* head_norms;  ///< [sequence, q_head, chunk_tokens]: inside the crossing chunk
  float* head_masses;  ///< [sequence, q_head, chunk_tokens]

  template <class Seen>
  static scan_scratch take(arena& from, const norm_scan& scan, const Seen& seen) noexcept {
    const index_t sequences = seen.sequences(), q_heads = seen.q_heads();
    const index_t chunks = chunking{seen.capacity(), scan.sinks}.count();
    return {from.take<double>(sequences, scan.groups(seen.kv_heads()), block_warps, chunks),
            from.take<double>(sequences, q_heads, chunk_tokens),
            from.take<float>(sequences, q_heads, chunk_tokens)};
  }
};

/// What is known of one query head of a sequence.
struct scanned_head {
  norm_scan scan;
  query_window window;
  index_t chunks;                ///< of the longest sequence
  chunk_statistics* statistics;  ///< [window, chunk]
  const row_normaliser* rows;    ///< [window]

  template <class Seen>
  [[nodiscard]] static REFREEKV_DEVICE scanned_head of(const norm_scan& scan, const Seen& seen,
                                                       const norm_scan_buffers& buffers,
                                                       index_t sequence, index_t q_head) noexcept {
    const index_t row = (sequence * seen.q_heads() + q_head) * scan.window;
    return {scan, window_of(seen, sequence, scan.window), buffers.chunks,
            buffers.statistics + row * buffers.chunks, buffers.rows + row};
  }

  [[nodiscard]] REFREEKV_DEVICE chunk_statistics& statistics_of(index_t row,
                                                                index_t chunk) const noexcept {
    return statistics[row * chunks + chunk];
  }

  /// The most that a value of 1 in a chunk stands for in any row. NaN once any row's is.
  [[nodiscard]] REFREEKV_DEVICE double largest_attention(index_t chunk) const noexcept {
    double largest = 0;
    for (index_t r = window.first_row(); r < scan.window; ++r) {
      const double attention = attention_at(statistics_of(r, chunk).unit, rows[r]);
      if (!(attention <= largest)) largest = attention;
      if (largest != largest) break;
    }
    return largest;
  }

  /// The energy of a chunk.
  [[nodiscard]] REFREEKV_DEVICE double energy(index_t chunk) const noexcept {
    const index_t first = window.first_row();
    if (first == scan.window) return 0;
    if (!scan.one_pass()) {
      const double largest = largest_attention(chunk);
      return largest * (largest * double{statistics_of(first, chunk).sum_squares});
    }
    double energy = 0;
    for (index_t r = first; r < scan.window; ++r) {
      const chunk_statistics& row = statistics_of(r, chunk);
      const double attention = attention_at(row.unit, rows[r]);
      energy += attention * (attention * double{row.sum_squares});
    }
    return energy;
  }

  /// The energy that no cut removes, and that a warp finds together.
  template <thread_block Block>
  [[nodiscard]] REFREEKV_DEVICE double outside_cut(Block& block) const noexcept {
    double energies = 0;
    if (scan.norm == norm_scope::full_row) {
      const index_t sinks = window.tokens < scan.sinks ? window.tokens : scan.sinks;
      const index_t count = chunking::of_sinks(sinks);
      for (index_t c = lane_of(block); c < count; c += warp_threads) energies += energy(c);
      energies = block.warp_reduce(energies, plus{});
    }
    return energies;
  }
};

/// The energy of the thread's token: `tokens` times `unit`.
struct token_energy {
  double unit;
  float tokens;
};

/// Reads a chunk of one query head again for the energies of its tokens. After each tile of rows
/// f(first row) is called by all threads, in step, and may use up the tile's values.
template <int Rows, thread_block Block, class Seen, class F>
[[nodiscard]] REFREEKV_DEVICE token_energy token_energies(Block& block, tile<Seen, Rows>& s,
                                                          const Seen& seen,
                                                          const scanned_head& head, index_t chunk,
                                                          tile_place at, const F& f) noexcept {
  const query_window& window = head.window;
  const bool mean = head.scan.average == row_average::mean;
  const bool own = block.rank() < at.size();
  const double largest = head.largest_attention(chunk);
  float energy = 0;
  for (at.first = 0; at.first < at.span.count(); at.first += Rows) {
    attend<leaves::values, any_lanes>(block, s, seen, window, at);
    set_units(block, s, [&](int i) {
      const index_t row = at.first + i;
      if (row >= window.rows || row < window.first_row() || largest == 0) return 0.0f;
      return static_cast<float>(attention_at(s.statistics[i].unit, head.rows[row]) / largest);
    });
    for (int i = 0; i < Rows && own; ++i) {
      const float value = s.values[i][block.rank()] * s.units[i];
      energy += mean ? value : value * value;
    }
    block.sync();
    f(at.first);
    block.sync();
  }
  if (mean && own) {
    const index_t rows = window.rows_seeing(at.tokens.begin + block.rank());
    energy = rows == 0 ? 0 : energy / static_cast<float>(rows);
    energy *= energy;
  }
  return {largest * largest, energy};
}

/// Where the rows of one query head are.
template <class Seen>
[[nodiscard]] REFREEKV_DEVICE tile_place head_place(const Seen& seen, const norm_scan& scan,
                                                    index_t sequence, index_t q_head,
                                                    token_range tokens) noexcept {
  return {sequence,
          q_head / (seen.q_heads() / seen.kv_heads()),
          {q_head, 1, 0, static_cast<int>(scan.window)},
          0,
          tokens};
}

/// A mean over rows needs their normalisers: from a second read of a chunk, its energy takes the
/// place of the first row's sum of squares.
template <class Seen, int Rows>
struct energies_body {
  struct shared {
    cuda_detail::tile<Seen, Rows> tile;
    warp_values<float> sums;
  };
  norm_scan scan;
  Seen seen;
  norm_scan_buffers buffers;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * buffers.chunks * seen.q_heads();
  }

  /// item: [sequence, chunk, q_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t q_head = item % seen.q_heads(), chunk = item / seen.q_heads() % buffers.chunks;
    const index_t sequence = item / seen.q_heads() / buffers.chunks;
    const scanned_head head = scanned_head::of(scan, seen, buffers, sequence, q_head);
    const chunking chunks{head.window.tokens, scan.sinks};
    const index_t first = head.window.first_row();
    if (chunk >= chunks.count() || first == scan.window) return;
    const tile_place at = head_place(seen, scan, sequence, q_head, chunks[chunk]);
    const token_energy energy =
        at.size() == 0 ? token_energy{0, 0}
                       : token_energies(block, s.tile, seen, head, chunk, at, [](int) {});
    const float sum = block_reduce(block, s.sums, energy.tokens, plus{});
    if (block.rank() == 0) head.statistics_of(first, chunk).sum_squares = sum;
  }
};

/// Leaves norms [sequence, group, chunk], at the chunks' starts. A warp a query head.
template <class Seen>
struct norm_curve_body {
  struct shared {};
  norm_scan scan;
  Seen seen;
  norm_scan_buffers buffers;
  double* warp_norms;  ///< [sequence, group, warp, chunk]

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * scan.groups(seen.kv_heads());
  }

  /// item: [sequence, group]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t groups = scan.groups(seen.kv_heads());
    const index_t sequence = item / groups, heads = seen.q_heads() / groups;
    const index_t count = chunking{seen.tokens(sequence), scan.sinks}.count();
    double* own = warp_norms + (item * block_warps + warp_of(block)) * buffers.chunks;
    for (index_t c = lane_of(block); c < count; c += warp_threads) own[c] = 0;
    for (index_t h = warp_of(block); h < heads; h += block_warps) {
      add(block, scanned_head::of(scan, seen, buffers, sequence, item % groups * heads + h), count,
          own);
    }
    block.sync();
    for (index_t c = block.rank(); c < buffers.chunks; c += block_threads) {
      double norm = 0;
      for (index_t w = 0; c < count && w < block_warps; ++w) {
        norm += warp_norms[(item * block_warps + w) * buffers.chunks + c];
      }
      buffers.norms[item * buffers.chunks + c] = norm;
    }
  }

 private:
  /// Adds the head's norms to norms [chunk], of which each lane has its own.
  template <thread_block Block>
  REFREEKV_DEVICE void add(Block& block, const scanned_head& head, index_t count,
                           double* norms) const noexcept {
    const index_t first = scan.first_chunk();
    double after = head.outside_cut(block);
    // Whole warps of chunks from the last one back, of which lane i has those with i left over.
    for (index_t base = (count - 1) / warp_threads * warp_threads; base + warp_threads > first;
         base -= warp_threads) {
      const index_t c = base + lane_of(block);
      const bool there = c >= first && c < count;
      const double norm = after + block.warp_suffix_sum(there ? head.energy(c) : 0.0);
      if (there) norms[c] += std::sqrt(norm);
      after = block.warp_broadcast(norm, 0);
    }
  }
};

/// norm_scan::last_allowed by a whole block. O(count / threads)
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE index_t last_allowed(Block& block, warp_values<index_t>& shared,
                                                   const norm_scan& scan, const double* curve,
                                                   index_t count, double baseline) noexcept {
  index_t last = 0;
  for (index_t i = block.rank(); i < count; i += block_threads) {
    if (norm_scan::loss(curve[i], baseline) <= scan.threshold) last = i;
  }
  return block_reduce(block, shared, last, larger{});
}

/// norm_scan::crossing by a whole block.
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE index_t crossing(Block& block, warp_values<index_t>& shared,
                                               const norm_scan& scan, const double* norms,
                                               index_t chunks) noexcept {
  const index_t first = scan.first_chunk();
  return first + last_allowed(block, shared, scan, norms + first, chunks - first, norms[first]);
}

/// Leaves what each query head adds to the curves inside its group's crossing chunk.
template <class Seen, int Rows>
struct crossing_body {
  struct shared {
    cuda_detail::tile<Seen, Rows> tile;
    warp_values<index_t> last;
    warp_values<double> sums;
  };
  norm_scan scan;
  Seen seen;
  norm_scan_buffers buffers;
  scan_scratch scratch;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.q_heads();
  }

  /// item: [sequence, q_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t sequence = item / seen.q_heads(), q_head = item % seen.q_heads();
    const index_t groups = scan.groups(seen.kv_heads());
    const index_t group = q_head / (seen.q_heads() / groups);
    const double* norms = buffers.norms + (sequence * groups + group) * buffers.chunks;
    const int t = block.rank();
    double& head_norm = scratch.head_norms[item * chunk_tokens + t];
    float& head_mass = scratch.head_masses[item * chunk_tokens + t];
    const scanned_head head = scanned_head::of(scan, seen, buffers, sequence, q_head);
    if (!scan.decides(head.window.tokens, norms)) {
      head_norm = head_mass = 0;
      return;
    }
    const chunking chunks{head.window.tokens, scan.sinks};
    const index_t chunk = crossing(block, s.last, scan, norms, chunks.count());
    const tile_place at = head_place(seen, scan, sequence, q_head, chunks[chunk]);

    float mass = 0;
    const token_energy energy =
        token_energies(block, s.tile, seen, head, chunk, at, [&](int first) {
          for (int i = warp_of(block); i < Rows; i += block_warps) {
            const index_t row = first + i;
            if (row >= scan.window || row < head.window.first_row()) continue;
            masses_before(block, head, row, chunk, s.tile.statistics[i].unit, s.tile.values[i],
                          at.size());
          }
          block.sync();
          for (int i = 0; i < Rows && t < at.size(); ++i) {
            const index_t row = first + i;
            if (row >= scan.window || row < head.window.first_row()) continue;
            mass = larger{}(mass, s.tile.values[i][t]);
          }
        });

    double after = 0;
    for (index_t c = chunk + 1 + t; c < chunks.count(); c += block_threads) after += head.energy(c);
    after = block_reduce(block, s.sums, after, plus{}) + head.outside_cut(block);
    const double own = t < at.size() ? energy.unit * double{energy.tokens} : 0;
    const double from_here = after + block_suffix_sum(block, s.sums, own).own;
    head_norm = t < at.size() ? std::sqrt(from_here) : 0;
    head_mass = mass;
  }

 private:
  /// A row's values become the attention to all candidates before each of their tokens.
  template <thread_block Block>
  REFREEKV_DEVICE void masses_before(Block& block, const scanned_head& head, index_t row,
                                     index_t chunk, float unit, float* values,
                                     int count) const noexcept {
    double before = 0;
    for (index_t c = scan.first_chunk() + lane_of(block); c < chunk; c += warp_threads) {
      const chunk_statistics& there = head.statistics_of(row, c);
      before += attention_at(there.unit, head.rows[row]) * double{there.sum};
    }
    before = block.warp_reduce(before, plus{});
    const double attention = attention_at(unit, head.rows[row]);
    for (int base = 0; base < count; base += warp_threads) {
      const int t = base + lane_of(block);
      const double own = t < count ? attention * double{values[t]} : 0;
      const double here = before + block.warp_prefix_sum(own);
      if (t < count) values[t] = static_cast<float>(here - own);
      before = block.warp_broadcast(here, warp_threads - 1);
    }
  }
};

/// Sums the heads of each group: chunk_norms and chunk_masses [sequence, group, chunk_tokens].
template <class Seen>
struct join_heads_body {
  struct shared {};
  norm_scan scan;
  Seen seen;
  norm_scan_buffers buffers;
  scan_scratch scratch;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * scan.groups(seen.kv_heads());
  }

  /// item: [sequence, group]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t heads = seen.q_heads() / scan.groups(seen.kv_heads());
    double norm = 0;
    float mass = 0;
    for (index_t h = item * heads; h < (item + 1) * heads; ++h) {
      norm += scratch.head_norms[h * chunk_tokens + block.rank()];
      mass = larger{}(mass, scratch.head_masses[h * chunk_tokens + block.rank()]);
    }
    buffers.chunk_norms[item * chunk_tokens + block.rank()] = norm;
    buffers.chunk_masses[item * chunk_tokens + block.rank()] = mass;
  }
};

/// Writes kept [sequence, group]: `stop`, by a whole block.
template <class Seen>
struct find_cuts_body {
  struct shared {
    warp_values<index_t> last;
  };
  norm_scan scan;
  Seen seen;
  norm_scan_buffers buffers;
  kept_ranges<typename Seen::memory> kept;

  [[nodiscard]] constexpr index_t items() const noexcept { return kept.extent(0) * kept.extent(1); }

  /// item: [sequence, group]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t groups = kept.extent(1), tokens = seen.tokens(item / groups);
    const double* norms = buffers.norms + item * buffers.chunks;
    const double* chunk_norms = buffers.chunk_norms + item * chunk_tokens;
    kept_range found = position_ranking(tokens, scan.sinks).all();
    if (scan.decides(tokens, norms)) {
      const chunking chunks{tokens, scan.sinks};
      const double baseline = norms[scan.first_chunk()];
      const index_t chunk = crossing(block, s.last, scan, norms, chunks.count());
      const token_range range = chunks[chunk];
      const index_t last =
          last_allowed(block, s.last, scan, chunk_norms, range.end - range.begin, baseline);
      found = cut_at(scan, tokens, chunk, last, baseline, chunk_norms[last],
                     buffers.chunk_masses[item * chunk_tokens + last]);
    }
    if (block.rank() == 0) kept(item / groups, item % groups) = found;
  }
};

template <class Backend, class Seen>
[[nodiscard]] status norm_curve(const Backend& on, const norm_scan& scan, const Seen& seen,
                                const norm_scan_buffers& buffers,
                                const scan_scratch& scratch) noexcept {
  status s = read_chunks(on, seen, scan.window, 0, scan.window, scan.sinks, buffers.chunks,
                         buffers.statistics);
  if (s == status::ok) {
    const normalise_body<Seen> body{
        seen,           scan.window,        0,           scan.window, scan.sinks,
        buffers.chunks, buffers.statistics, buffers.rows};
    s = run_blocks(on, body.items(), body);
  }
  if (s == status::ok && !scan.one_pass()) {
    s = with_tile<few_rows<Seen>>(scan.window, [&](auto rows) {
      const energies_body<Seen, rows()> body{scan, seen, buffers};
      return run_blocks(on, body.items(), body);
    });
  }
  if (s == status::ok) {
    const norm_curve_body<Seen> body{scan, seen, buffers, scratch.warp_norms};
    s = run_blocks(on, body.items(), body);
  }
  return s;
}

template <class Backend, class Seen>
[[nodiscard]] status crossing_curve(const Backend& on, const norm_scan& scan, const Seen& seen,
                                    const norm_scan_buffers& buffers,
                                    const scan_scratch& scratch) noexcept {
  const status s = with_tile<few_rows<Seen>>(scan.window, [&](auto rows) {
    const crossing_body<Seen, rows()> body{scan, seen, buffers, scratch};
    return run_blocks(on, body.items(), body);
  });
  if (s != status::ok) return s;
  const join_heads_body<Seen> body{scan, seen, buffers, scratch};
  return run_blocks(on, body.items(), body);
}

template <class Backend, class Seen>
[[nodiscard]] status find_cuts(const Backend& on, const norm_scan& scan, const Seen& seen,
                               const norm_scan_buffers& buffers,
                               const kept_ranges<typename Seen::memory>& kept) noexcept {
  const find_cuts_body<Seen> body{scan, seen, buffers, kept};
  return run_blocks(on, body.items(), body);
}

}  // namespace refreekv::inline v0::cuda_detail
