// SPDX-License-Identifier: Apache-2.0
// Attention of a window's rows, with their softmax, to all tokens of their sequences.
#pragma once

#include "refreekv/backend/token_scores.hpp"
#include "refreekv/cpu/executor.hpp"
#include "refreekv/cpu/window_attention.hpp"

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

/// Scratch of for_each_attention. Values of all chunks are kept until the rows' normalisers are
/// known, so that keys are multiplied once. Several KV heads have a slot each; they are processed
/// together, one after the other if they are long.
struct attention_scratch {
  index_t slot_count;  ///< KV heads that are processed together
  index_t rows;        ///< rows of each query head that are processed together
  index_t chunks;      ///< of the longest sequence
  worker_tiles tiles;
  std::byte* queries;  ///< [slot, query_bytes]; null for ready rows
  index_t query_bytes;
  float* values;                 ///< [slot, chunk, q_head of the KV head, rows, tile_stride]
  chunk_statistics* statistics;  ///< [slot, q_head of the KV head, rows, chunk]
  row_normaliser* normalisers;   ///< [slot, q_head of the KV head, rows]
  index_t* left_out;             ///< [slot]: rows that were left out
  double* sums;                  ///< [slot, 2, q_head of the KV head, capacity]
  double* totals;                ///< [sequence, kv_head, chunk, q_heads of the KV head + 1]

  template <class Layer>
  static attention_scratch carve(arena& from, index_t workers, index_t window,
                                 const Layer& layer) noexcept {
    // As many rows as repay reading the keys for them, but fewer of long sequences: their values
    // take at most 9 MB of a slot up to 131,072 tokens.
    constexpr index_t slot_values = index_t{1} << 21, least_rows = 16, most_rows = 64;
    constexpr index_t worker_bytes = index_t{4} << 20;  // of slots for each worker
    const index_t heads = layer.q_heads() / layer.kv_heads(), capacity = layer.capacity();
    const index_t fit = slot_values / (std::max)(capacity, index_t{1});
    const index_t together = std::clamp(fit, least_rows, most_rows) / heads;
    attention_scratch s{};
    s.rows = std::clamp<index_t>(together, 1, (std::max)(window, index_t{1}));
    s.chunks = chunking{capacity, 0}.count();
    const index_t rows = heads * s.rows;
    const index_t slot_bytes = lines_of<float>(s.chunks, rows, tile_stride) +
                               lines_of<double>(index_t{2}, heads, capacity);
    s.slot_count =
        std::clamp<index_t>(workers * worker_bytes / slot_bytes, 1,
                            (std::max)(layer.sequences() * layer.kv_heads(), index_t{1}));
    s.tiles = worker_tiles::carve(from, workers, rows, 0, layer);
    if constexpr (has_queries<Layer>) {
      s.query_bytes =
          packed_bytes<product_of<Layer>>(rows, layer.head_dim(), are_many(heads * window));
      s.queries = from.array<std::byte>(s.slot_count, s.query_bytes);
    }
    s.values = from.array<float>(s.slot_count, s.chunks, rows, tile_stride);
    s.statistics = from.array<chunk_statistics>(s.slot_count, rows, s.chunks);
    s.normalisers = from.array<row_normaliser>(s.slot_count, rows);
    s.left_out = from.array<index_t>(s.slot_count);
    s.sums = from.array<double>(s.slot_count, index_t{2}, heads, capacity);
    s.totals = from.array<double>(layer.sequences(), layer.kv_heads(), s.chunks, heads + 1);
    return s;
  }
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

/// The slots of some KV heads, and the rows of these that are processed together.
template <class Layer>
class attention_slots {
 public:
  attention_slots(const Layer& layer, index_t window, bad_rows bad,
                  const attention_scratch& scratch, index_t first, index_t slot_count) noexcept
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
      work_.left_out[slot] = 0;
    }
  }

  /// Groups of rows; at least one, which may be empty.
  [[nodiscard]] index_t groups() const noexcept { return groups_; }
  /// Chunks of all slots.
  [[nodiscard]] index_t chunks() const noexcept { return chunks_; }

  [[nodiscard]] index_t sequence(index_t slot) const noexcept {
    return (first_ + slot) / layer_.kv_heads();
  }
  [[nodiscard]] index_t kv_head(index_t slot) const noexcept {
    return (first_ + slot) % layer_.kv_heads();
  }

  /// Packs the queries of a query head of a slot.
  void pack(index_t group, index_t slot, index_t head) const noexcept {
    const rows_of_group rows = rows_of(group, slot);
    if (rows.count == 0) return;
    pack_queries(part_of(rows), sequence(slot), kv_head(slot) * heads_ + head, rows.count,
                 queries(slot));
  }

  /// Calls f(slot, chunk number) for the chunks [begin, end) of all slots.
  template <class F>
  void for_each_chunk(index_t begin, index_t end, const F& f) const noexcept {
    index_t slot = 0, chunk = begin;
    for (index_t i = begin; i < end; ++i, ++chunk) {
      while (chunk >= chunks_of(slot).count()) chunk -= chunks_of(slot++).count();
      f(slot, chunk);
    }
  }

  /// Writes the values and statistics of a group's rows in a chunk of a slot.
  void attend(index_t group, int worker, index_t slot, index_t chunk) const noexcept {
    const rows_of_group rows = rows_of(group, slot);
    if (rows.count == 0) return;
    tile_scratch tile = work_.tiles.of(worker);
    tile.values = values(slot, chunk);
    const token_range tokens = chunks_of(slot)[chunk], hull = rows.window.hull();
    const index_t all = heads_ * rows.count;
    if (tokens.end <= hull.begin || tokens.begin >= hull.end) {
      std::fill_n(tile.statistics, all,
                  chunk_statistics{-std::numeric_limits<float>::infinity(), 0, 0});
    } else {
      const index_t next = (std::min)(chunk + 1, chunks_of(slot).count() - 1);
      attend_chunk(
          part_of(rows), rows.window, queries(slot), {sequence(slot), kv_head(slot), tokens},
          {sequence(slot), kv_head(slot), chunks_of(slot)[next]}, output::exact_values, tile);
    }
    for (index_t i = 0; i < all; ++i) statistics(slot, i)[chunk] = tile.statistics[i];
  }

  /// Writes the normalisers of a group's rows of a slot.
  void normalise(index_t group, index_t slot) const noexcept {
    const rows_of_group rows = rows_of(group, slot);
    const auto& part = part_of(rows);
    row_normaliser* normaliser = normalisers(slot);
    for (index_t i = 0; i < heads_ * rows.count; ++i) {
      const index_t q_head = kv_head(slot) * heads_ + i / rows.count, row = i % rows.count;
      if constexpr (has_queries<Layer>) {
        const auto& sinks = layer_.info.attention.sink_logits;
        normaliser[i] = detail::normalise(
            statistics(slot, i), chunks_of(slot).count(),
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
      ++work_.left_out[slot];
      for (index_t h = 0; h < heads_; ++h) normaliser[h * rows.count + r].sum = 0;
    }
  }

  /// Calls f(row_attention) for a group's rows in a chunk of a slot, but not for rows that are left
  /// out or see none of the chunk's tokens.
  template <class F>
  void for_each_row(index_t group, index_t slot, index_t chunk, const F& f) const noexcept {
    const rows_of_group rows = rows_of(group, slot);
    const auto [first, last] = chunks_of(slot)[chunk];
    for (index_t i = 0; i < heads_ * rows.count; ++i) {
      const row_normaliser& normaliser = normalisers(slot)[i];
      const token_range visible = rows.window.visible(i % rows.count);
      const token_range tokens{std::clamp(visible.begin, first, last),
                               std::clamp(visible.end, first, last)};
      if (tokens.begin == tokens.end) continue;
      if (bad_ == bad_rows::left_out && !normaliser.exists()) continue;
      const float exponent = statistics(slot, i)[chunk].exponent;
      f(row_attention{i / rows.count, tokens,
                      values(slot, chunk) + i * tile_stride + tokens.begin - first,
                      detail::weight_of(exponent, normaliser)});
    }
  }

  /// The chunks of a slot's sequence.
  [[nodiscard]] chunking chunks_of(index_t slot) const noexcept {
    return {layer_.tokens(sequence(slot)), 0};
  }

 private:
  /// The rows of a group in one slot: existing rows only.
  struct rows_of_group {
    index_t first;  ///< in the window
    index_t count;
    query_window window;
  };

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

  [[nodiscard]] index_t rows_of_slot() const noexcept { return heads_ * work_.rows; }
  [[nodiscard]] packed_queries queries(index_t slot) const noexcept {
    return {work_.queries + slot * work_.query_bytes, are_many(heads_ * window_)};
  }
  [[nodiscard]] float* values(index_t slot, index_t chunk) const noexcept {
    return work_.values + (slot * work_.chunks + chunk) * rows_of_slot() * tile_stride;
  }
  [[nodiscard]] chunk_statistics* statistics(index_t slot, index_t row) const noexcept {
    return work_.statistics + (slot * rows_of_slot() + row) * work_.chunks;
  }
  [[nodiscard]] row_normaliser* normalisers(index_t slot) const noexcept {
    return work_.normalisers + slot * rows_of_slot();
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
  const index_t heads = layer.q_heads() / layer.kv_heads();
  const index_t all = layer.sequences() * layer.kv_heads();
  for (index_t first = 0; first < all; first += scratch.slot_count) {
    const index_t slot_count = (std::min)(scratch.slot_count, all - first);
    const attention_slots<Layer> s(layer, window, bad, scratch, first, slot_count);
    const auto place = [&](index_t slot, index_t chunk) {
      return attended_chunk{
          slot, chunk, {s.sequence(slot), s.kv_head(slot), s.chunks_of(slot)[chunk]}};
    };
    index_t work = s.chunks() * chunk_tokens * heads * scratch.rows;
    if constexpr (has_queries<Layer>) work *= layer.head_dim() / 8 + 1;
    const auto for_each_chunk = [&](const auto& f) {
      const auto run = [&](int worker, index_t begin, index_t end) {
        s.for_each_chunk(begin, end, [&](index_t slot, index_t chunk) { f(worker, slot, chunk); });
      };
      if (work >= index_t{1} << 16) {
        for_each_range(threads, s.chunks(), run);
      } else {
        run(0, 0, s.chunks());
      }
    };
    for (index_t group = 0; group < s.groups(); ++group) {
      if constexpr (has_queries<Layer>) {
        for_each_item(threads, slot_count * heads,
                      slot_count * heads * scratch.rows * layer.head_dim(),
                      [&](int, index_t i) { s.pack(group, i / heads, i % heads); });
      }
      for_each_chunk(
          [&](int worker, index_t slot, index_t chunk) { s.attend(group, worker, slot, chunk); });
      for_each_item(threads, slot_count, slot_count * heads * scratch.rows * scratch.chunks,
                    [&](int, index_t slot) { s.normalise(group, slot); });
      for_each_chunk([&](int, index_t slot, index_t chunk) {
        const attended_chunk at = place(slot, chunk);
        if (group == 0) visit.start(at);
        s.for_each_row(group, slot, chunk, [&](const row_attention& row) { visit.add(at, row); });
        if (group == s.groups() - 1) visit.finish(at, scratch.left_out[slot]);
      });
    }
  }
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
