// SPDX-License-Identifier: Apache-2.0
// Attention of a window's rows, with their softmax, to all tokens of their sequences.
#pragma once

#include "refreekv/backend/token_scores.hpp"
#include "refreekv/cpu/attention_scratch.hpp"
#include "refreekv/cpu/executor.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// The attention of one row of a query head to some tokens of a chunk, all of which it sees:
/// weight * values [tokens]. The weight is NaN for a row without a softmax.
struct row_attention {
  index_t q_head;  ///< of the KV head: in [0, q_heads / kv_heads)
  token_range tokens;
  const float* values;
  double weight;
};

/// A chunk of the KV head in a slot of attention_scratch.
struct attended_chunk {
  index_t slot, chunk;
  chunk_place place;
};

/// Returns rows [first, first + rows) of a tensor [sequence, row, q_head, ...].
template <class T>
[[nodiscard]] view<T, 4> only_rows(const view<T, 4>& all, index_t first, index_t rows) noexcept {
  return {all.at(0, first),
          {all.extent(0), rows, all.extent(2), all.extent(3)},
          {all.stride(0), all.stride(1), all.stride(2), all.stride(3)}};
}

/// Returns whether all attention that a ready row sees is finite.
template <class Row>
[[nodiscard]] bool all_finite(const Row* attention, index_t stride, token_range visible) noexcept {
  bool finite = true;
  for (index_t t = visible.begin; t < visible.end; ++t) {
    finite &= std::isfinite(widen(attention[t * stride]));
  }
  return finite;
}

/// A wave: some KV heads, each with a slot, whose rows are attended to in groups.
template <class Layer>
class attention_wave {
 public:
  attention_wave(const Layer& layer, index_t window, bad_rows bad, const attention_scratch& scratch,
                 index_t first, index_t slot_count) noexcept
      : layer_(layer),
        window_(window),
        bad_(bad),
        work_(scratch),
        first_(first),
        heads_(layer.q_heads() / layer.kv_heads()) {
    for (index_t slot = 0; slot < slot_count; ++slot) {
      const query_window all = window_of(layer, sequence(slot), window);
      groups_ = (std::max)(groups_, (all.count() + work_.rows - 1) / work_.rows);
      chunks_ += chunks_of(slot).count();
    }
  }

  /// Groups of rows; at least one, which may be empty.
  [[nodiscard]] index_t groups() const noexcept { return groups_; }
  /// Chunks of all slots.
  [[nodiscard]] index_t chunks() const noexcept { return chunks_; }

  /// Attends with a group of rows to the chunks [begin, end) of all slots, after it has visited the
  /// rows of the group before: their normalisers are now known. So a chunk's values are visited by
  /// the worker that wrote them, which then overwrites them.
  template <class Visit>
  void run(index_t group, int worker, index_t begin, index_t end,
           const Visit& visit) const noexcept {
    index_t slot = 0, chunk = begin;
    for (index_t i = begin; i < end; ++i, ++chunk) {
      while (chunk >= chunks_of(slot).count()) chunk -= chunks_of(slot++).count();
      if (i == begin || chunk == 0) {
        if (group == 0) left_out(worker, slot) = 0;
        if (group > 0) normalise(group - 1, worker, slot);
        if (group < groups_) pack(group, worker, slot);
      }
      const attended_chunk at{slot, chunk, place_of(slot, chunk)};
      if (group == 0) visit.start(at);
      if (group > 0) {
        for_each_row(group - 1, worker, at, [&](const row_attention& row) { visit.add(at, row); });
      }
      if (group == groups_) visit.finish(at, left_out(worker, slot));
      if (group < groups_) attend(group, worker, at);
    }
  }

 private:
  /// The rows of a group in one slot: existing rows only.
  struct rows_of_group {
    index_t first;  ///< in the window
    index_t count;
    query_window window;
  };

  [[nodiscard]] index_t sequence(index_t slot) const noexcept {
    return (first_ + slot) / layer_.kv_heads();
  }
  [[nodiscard]] index_t kv_head(index_t slot) const noexcept {
    return (first_ + slot) % layer_.kv_heads();
  }
  [[nodiscard]] chunking chunks_of(index_t slot) const noexcept {
    return {layer_.tokens(sequence(slot)), 0};
  }
  [[nodiscard]] chunk_place place_of(index_t slot, index_t chunk) const noexcept {
    return {sequence(slot), kv_head(slot), chunks_of(slot)[chunk]};
  }

  [[nodiscard]] rows_of_group rows_of(index_t group, index_t slot) const noexcept {
    const query_window all = window_of(layer_, sequence(slot), window_);
    const index_t first = (std::min)(all.first_row() + group * work_.rows, window_);
    const index_t count = (std::min)(work_.rows, window_ - first);
    return {first, count, all.part(first, count)};
  }
  /// The layer with the rows of a group only.
  [[nodiscard]] Layer part_of(const rows_of_group& rows) const noexcept {
    Layer part = layer_;
    const index_t first = layer_.window() - window_ + rows.first;
    if constexpr (has_queries<Layer>) {
      part.queries = only_rows(layer_.queries, first, rows.count);
    } else {
      part.rows = only_rows(layer_.rows, first, rows.count);
    }
    return part;
  }

  /// Packs the queries of a group for a worker.
  void pack(index_t group, int worker, index_t slot) const noexcept {
    if constexpr (has_queries<Layer>) {
      const rows_of_group rows = rows_of(group, slot);
      for (index_t h = 0; rows.count > 0 && h < heads_; ++h) {
        pack_queries(part_of(rows), sequence(slot), kv_head(slot) * heads_ + h, rows.count,
                     queries(worker, slot));
      }
    }
  }

  /// Writes the values and statistics of a group's rows in a chunk.
  void attend(index_t group, int worker, const attended_chunk& at) const noexcept {
    const rows_of_group rows = rows_of(group, at.slot);
    if (rows.count == 0) return;
    tile_scratch tile = work_.tiles.of(worker);
    tile.values = values(at);
    const token_range tokens = at.place.tokens, hull = rows.window.hull();
    if (tokens.end <= hull.begin || tokens.begin >= hull.end) {
      std::fill_n(tile.statistics, heads_ * rows.count,
                  chunk_statistics{-std::numeric_limits<float>::infinity(), 0, 0});
    } else {
      const index_t next = (std::min)(at.chunk + 1, chunks_of(at.slot).count() - 1);
      attend_chunk(part_of(rows), rows.window, queries(worker, at.slot), at.place,
                   place_of(at.slot, next), output::exact_values, tile);
    }
    for (index_t i = 0; i < heads_ * rows.count; ++i) {
      statistics(group, at.slot, i)[at.chunk] = tile.statistics[i];
    }
  }

  /// Writes the normalisers of a group's rows for a worker.
  void normalise(index_t group, int worker, index_t slot) const noexcept {
    const rows_of_group rows = rows_of(group, slot);
    const Layer part = part_of(rows);
    row_normaliser* normaliser = normalisers(worker);
    for (index_t i = 0; i < heads_ * rows.count; ++i) {
      const index_t q_head = kv_head(slot) * heads_ + i / rows.count, row = i % rows.count;
      if constexpr (has_queries<Layer>) {
        const auto& sinks = layer_.info.attention.sink_logits;
        normaliser[i] = detail::normalise(
            statistics(group, slot, i), chunks_of(slot).count(),
            sinks.data() != nullptr ? sinks(q_head) : -std::numeric_limits<float>::infinity());
      } else {
        const bool exists =
            bad_ == bad_rows::stay || all_finite(part.rows.at(sequence(slot), row, q_head),
                                                 part.rows.stride(3), rows.window.visible(row));
        normaliser[i] = {0, exists ? 1.0 : 0.0};
      }
    }
    for (index_t r = 0; bad_ == bad_rows::left_out && r < rows.count; ++r) {
      bool exists = true;
      for (index_t h = 0; h < heads_; ++h) exists &= normaliser[h * rows.count + r].exists();
      if (exists) continue;
      ++left_out(worker, slot);
      for (index_t h = 0; h < heads_; ++h) normaliser[h * rows.count + r].sum = 0;
    }
  }

  /// Calls f(row_attention) for a group's rows in a chunk, but not for rows that are left out or
  /// see none of its tokens.
  template <class F>
  void for_each_row(index_t group, int worker, const attended_chunk& at,
                    const F& f) const noexcept {
    const rows_of_group rows = rows_of(group, at.slot);
    const auto [first, last] = at.place.tokens;
    for (index_t i = 0; i < heads_ * rows.count; ++i) {
      const row_normaliser& normaliser = normalisers(worker)[i];
      const token_range visible = rows.window.visible(i % rows.count);
      const token_range tokens{std::clamp(visible.begin, first, last),
                               std::clamp(visible.end, first, last)};
      if (tokens.begin == tokens.end) continue;
      if (bad_ == bad_rows::left_out && !normaliser.exists()) continue;
      const float exponent = statistics(group, at.slot, i)[at.chunk].exponent;
      f(row_attention{i / rows.count, tokens, values(at) + i * tile_stride + tokens.begin - first,
                      detail::weight_of(exponent, normaliser)});
    }
  }

  [[nodiscard]] index_t rows_of_slot() const noexcept { return heads_ * work_.rows; }
  [[nodiscard]] float* values(const attended_chunk& at) const noexcept {
    return work_.values + (at.slot * work_.chunks + at.chunk) * rows_of_slot() * tile_stride;
  }
  /// Statistics [chunk] of a row. Two groups are in use at a time.
  [[nodiscard]] chunk_statistics* statistics(index_t group, index_t slot,
                                             index_t row) const noexcept {
    const index_t place = group % 2 * work_.slot_count + slot;
    return work_.statistics + (place * rows_of_slot() + row) * work_.chunks;
  }
  [[nodiscard]] packed_queries queries(int worker, index_t slot) const noexcept {
    const query_window all = window_of(layer_, sequence(slot), window_);
    return {work_.queries + worker * work_.query_bytes, are_many(heads_ * all.count())};
  }
  [[nodiscard]] row_normaliser* normalisers(int worker) const noexcept {
    return work_.normalisers + worker * rows_of_slot();
  }
  [[nodiscard]] index_t& left_out(int worker, index_t slot) const noexcept {
    return work_.left_out[worker * work_.slot_count + slot];
  }

  const Layer& layer_;
  index_t window_;
  bad_rows bad_;
  const attention_scratch& work_;
  index_t first_, heads_;
  index_t groups_ = 1, chunks_ = 0;
};

/// Attention of the last `window` rows to all tokens. For each chunk of each KV head of each
/// sequence, calls visit.start(chunk), then visit.add(chunk, row_attention) row by row, then
/// visit.finish(chunk, left_out) with the number of rows that were left out of the KV head. Work is
/// divided by chunks among all workers; the rows of a query head are added in their order whatever
/// the number of workers is.
template <class Executor, class Layer, class Visit>
void for_each_attention(const Executor& threads, const Layer& layer, index_t window, bad_rows bad,
                        const attention_scratch& scratch, const Visit& visit) noexcept {
  const index_t all = layer.sequences() * layer.kv_heads();
  for (index_t first = 0; first < all; first += scratch.slot_count) {
    const attention_wave<Layer> wave(layer, window, bad, scratch, first,
                                     (std::min)(scratch.slot_count, all - first));
    index_t work = chunk_tokens * layer.q_heads() / layer.kv_heads() * scratch.rows;
    if constexpr (has_queries<Layer>) work *= layer.head_dim() / 8 + 1;
    for (index_t group = 0; group <= wave.groups(); ++group) {
      const auto run = [&](int worker, index_t begin, index_t end) {
        wave.run(group, worker, begin, end, visit);
      };
      if (wave.chunks() * work >= index_t{1} << 16) {
        for_each_range(threads, wave.chunks(), run);
      } else {
        run(0, 0, wave.chunks());
      }
    }
  }
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
