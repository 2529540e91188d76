// SPDX-License-Identifier: Apache-2.0
// Moves rows of a cache on the CPU, in any layout.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "refreekv/cache/source.hpp"
#include "refreekv/cpu/simd/target.hpp"
#include "refreekv/decision/compaction.hpp"
#include "refreekv/decision/kept_positions.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Returns whether a run is token-contiguous: the next element in memory is the same dimension of
/// the next token.
template <class T>
[[nodiscard]] bool lies_across(const token_run<T>& run) noexcept {
  return run.token_stride == 1 && run.dim_stride != 1;
}

/// Copies `count` rows [token, head_dim] from one run to another. The runs may overlap if `to` is
/// not above `from`, or if both are token-contiguous. O(count * head_dim).
template <class T>
void copy_rows(const token_run<T>& to, const token_run<T>& from, index_t count,
               index_t head_dim) noexcept {
  static_assert(std::is_trivially_copyable_v<T> && !std::is_const_v<T>,
                "compaction needs a cache that can be written");
  const auto bytes = [](index_t n) { return static_cast<std::size_t>(n) * sizeof(T); };
  if (to.dim_stride == 1 && from.dim_stride == 1) {
    if (to.token_stride == head_dim && from.token_stride == head_dim) {
      std::memmove(to.data, from.data, bytes(count * head_dim));
      return;
    }
    for (index_t t = 0; t < count; ++t) {
      std::memmove(to.data + t * to.token_stride, from.data + t * from.token_stride,
                   bytes(head_dim));
    }
  } else if (lies_across(to) && lies_across(from)) {
    for (index_t d = 0; d < head_dim; ++d) {
      std::memmove(to.data + d * to.dim_stride, from.data + d * from.dim_stride, bytes(count));
    }
  } else {
    for (index_t t = 0; t < count; ++t) {
      for (index_t d = 0; d < head_dim; ++d) {
        to.data[t * to.token_stride + d * to.dim_stride] =
            from.data[t * from.token_stride + d * from.dim_stride];
      }
    }
  }
}

/// Row i of `count` rows moves from `position(i)` to `target` + i. Returns the first row of their
/// last batch: consecutive rows that one source run and one target run hold, both token-contiguous.
/// If there are no such runs, the last row is a batch by itself and the result is count - 1.
template <class Run, class Position>
[[nodiscard]] index_t first_of_last(const Run& run, index_t count, const Position& position,
                                    index_t target) noexcept {
  const auto reach = [&](index_t i) {
    const auto from = run(position(i)), to = run(target + i);
    return lies_across(from) && lies_across(to) &&
           position(count - 1) - position(i) < from.tokens && count - i <= to.tokens;
  };
  index_t first = count - 1;
  while (first > 0 && reach(first - 1)) --first;
  return first;
}

/// Moves rows of one (sequence, kv_head) within its cache, as if through a buffer. O(rows moved *
/// head_dim).
template <kv_source Source>
void move_rows(const Source& source, index_t sequence, index_t kv_head, token_move move) noexcept {
  const auto run = [&](index_t token) { return source.run_at(sequence, kv_head, token); };
  if (move.target <= move.source) {
    for (index_t done = 0; done < move.tokens;) {
      const auto from = run(move.source + done);
      const auto to = run(move.target + done);
      const index_t count = (std::min)({move.tokens - done, from.tokens, to.tokens});
      copy_rows(to, from, count, source.shape().head_dim);
      done += count;
    }
  } else {
    const auto position = [&](index_t i) { return move.source + i; };
    for (index_t first, end = move.tokens; end > 0; end = first) {
      first = first_of_last(run, end, position, move.target);
      copy_rows(run(move.target + first), run(position(first)), end - first,
                source.shape().head_dim);
    }
  }
}

/// Gathers `count` rows of one (sequence, kv_head) in a token-contiguous layout, into slots
/// `target` and on. Copies dimension by dimension, and as many rows at once as a source and a
/// target run hold. run(token) returns the run at a token; position(i) returns the position of the
/// i-th kept row.
template <class Run, class Position>
void gather_across(const Run& run, const Position& position, index_t count, index_t target,
                   index_t head_dim, compaction mode) noexcept {
  const auto copy = [&](const auto& to, const auto& from, index_t first, index_t end) {
    if (end - first == 1) return copy_rows(to, from, 1, head_dim);
    for (index_t d = 0; d < head_dim; ++d) {
      auto* row = to.data + d * to.dim_stride;
      const auto* from_row = from.data + d * from.dim_stride;
      const auto copy_one = [&](index_t i) {
        row[i - first] = from_row[position(i) - position(first)];
      };
      if (mode == compaction::suffix_down) {
        for (index_t i = first; i < end; ++i) copy_one(i);
      } else {
        for (index_t i = end - 1; i >= first; --i) copy_one(i);
      }
    }
  };
  const auto stays = [&](index_t i) { return position(i) == target + i; };
  if (mode == compaction::suffix_down) {
    for (index_t i = 0, end; i < count; i = end) {
      end = i + 1;
      if (stays(i)) continue;
      const auto from = run(position(i)), to = run(target + i);
      if (lies_across(from) && lies_across(to)) {
        const index_t most = (std::min)(count - i, to.tokens) + i;
        while (end < most && position(end) - position(i) < from.tokens) ++end;
      }
      copy(to, from, i, end);
    }
  } else {
    for (index_t first, end = count; end > 0; end = first) {
      first = end - 1;
      if (stays(first)) continue;
      first = first_of_last(run, end, position, target);
      copy(run(target + first), run(position(first)), first, end);
    }
  }
}

/// Gathers the kept rows of one (sequence, kv_head) within its cache. O(rows moved * head_dim).
template <kv_source Source>
void gather_rows(const Source& source, index_t sequence, index_t kv_head,
                 const kept_positions<>& kept, compaction mode) noexcept {
  const kept_tokens& k = kept.counts(sequence, kv_head);
  const index_t first = first_slot(k, mode), head_dim = source.shape().head_dim;
  const auto run = [&](index_t token) { return source.run_at(sequence, kv_head, token); };
  const auto position = [&](index_t i) { return index_t{kept.positions(sequence, kv_head, i)}; };
  if (k.count > 0 && lies_across(run(position(0)))) {
    return gather_across(run, position, k.count, first, head_dim, mode);
  }
  const bool down = mode == compaction::suffix_down;
  for (index_t n = 0; n < k.count; ++n) {
    const index_t i = down ? n : k.count - 1 - n;  // never overwrites a row that has yet to move
    const index_t from = position(i), to = first + i;
    if (from != to) copy_rows(run(to), run(from), 1, head_dim);
  }
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
