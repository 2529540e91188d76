// SPDX-License-Identifier: Apache-2.0
// Finds memory that a compaction would write more than once. A compaction goes over every source
// and every (sequence, kv_head) as if all rows were different memory.
//
// The checks find what a host can see without reading a cache: overlapping rows of two sources, an
// axis with stride 0, a page that is listed twice. For device memory they see only strides and base
// pointers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>

#include "refreekv/cache/source.hpp"
#include "refreekv/decision/stand_ins.hpp"

namespace refreekv::inline v0::detail {

/// The slots of one (sequence, kv_head) that a compaction writes; empty if nothing moves.
[[nodiscard]] constexpr token_range written_slots(const view<const kept_range, 2>& kept,
                                                  index_t sequence, index_t kv_head,
                                                  compaction mode) noexcept {
  const token_move move = move_of(kept(sequence, kept.extent(1) == 1 ? 0 : kv_head), mode);
  return {move.target, move.target + move.tokens};
}
[[nodiscard]] constexpr token_range written_slots(const kept_positions<>& kept, index_t sequence,
                                                  index_t kv_head, compaction mode) noexcept {
  const kept_tokens& k = kept.counts(sequence, kv_head);
  const index_t first = first_slot(k, mode);
  const auto stays = [&](index_t i) { return kept.positions(sequence, kv_head, i) == first + i; };
  index_t begin = 0, end = k.count;
  while (begin < end && stays(begin)) ++begin;
  while (begin < end && stays(end - 1)) --end;
  return {first + begin, first + end};
}

[[nodiscard]] constexpr token_range written_slots(const kept_with_stand_ins<>& kept,
                                                  index_t sequence, index_t kv_head,
                                                  compaction mode) noexcept {
  const kept_positions<>& positions = kept;
  const token_range moved = written_slots(positions, sequence, kv_head, mode);
  const kept_tokens& k = kept.counts(sequence, kv_head);
  const index_t count = kept.length(sequence, kv_head) - k.count;
  const index_t first = first_stand_in(k, count, mode);
  if (count == 0) return moved;
  if (moved.begin == moved.end) return {first, first + count};
  return {(std::min)(moved.begin, first), (std::max)(moved.end, first + count)};
}

/// Whether two rows, of `a_dims` and `b_dims` elements, have a byte in common. Returns false
/// without a check if their strides along head_dim differ.
template <class A, class B>
[[nodiscard]] bool rows_overlap(const token_run<A>& a, index_t a_dims, const token_run<B>& b,
                                index_t b_dims) noexcept {
  if (a.data == nullptr || b.data == nullptr || a_dims < 1 || b_dims < 1) return false;
  constexpr auto a_size = static_cast<index_t>(sizeof(A)), b_size = static_cast<index_t>(sizeof(B));
  const index_t a_stride = a_dims == 1 ? 0 : a.dim_stride * a_size;
  const index_t b_stride = b_dims == 1 ? 0 : b.dim_stride * b_size;
  // Bytes from a's first byte to b's. Pointers into different arrays may not be subtracted.
  const auto offset = static_cast<index_t>(static_cast<std::intptr_t>(
      reinterpret_cast<std::uintptr_t>(b.data) - reinterpret_cast<std::uintptr_t>(a.data)));
  if (a_stride == a_size && b_stride == b_size) {
    return offset < a_dims * a_size && -offset < b_dims * b_size;
  }
  if (a_dims > 1 && b_dims > 1 && a_stride != b_stride) return false;
  const index_t stride = a_dims == 1 ? b_stride : a_stride;
  // Overlap: some i of a and k of b have -b_size < offset + (k - i) * stride < a_size.
  const auto touches = [&](index_t steps) {
    const index_t distance = offset + steps * stride;
    return -b_size < distance && distance < a_size && steps > -a_dims && steps < b_dims;
  };
  if (stride == 0) return touches(0);
  const index_t nearest = -offset / stride;
  return touches(nearest - 1) || touches(nearest) || touches(nearest + 1);
}

/// A row that shows where a source's memory is. On the host it is the last token of the first
/// sequence that is not empty, because prefixes and null blocks may be shared. On a device it is
/// the first slot of the tensor, because lengths and tables are not read. Its pointer is null if no
/// row is known.
template <kv_source Source>
[[nodiscard]] constexpr auto landmark(const Source& source) noexcept {
  using run = token_run<typename Source::element_type>;
  if constexpr (std::same_as<typename Source::memory, host_memory>) {
    for (index_t s = 0; s < source.shape().sequences && source.shape().kv_heads > 0; ++s) {
      if (source.tokens(s) > 0) return source.run_at(s, 0, source.tokens(s) - 1);
    }
  } else if constexpr (requires { source.first_slot_row(); }) {
    if (source.shape().capacity > 0) return source.first_slot_row();
  }
  return run{};
}

/// Null, or the error that two sources share memory: they are equal, or one is a part of the rows
/// of the other.
template <kv_source First, kv_source... Others>
[[nodiscard]] constexpr const char* share_memory(const First& first,
                                                 const Others&... others) noexcept {
  [[maybe_unused]] const auto overlaps = [&](const auto& other) {
    return rows_overlap(landmark(first), first.shape().head_dim, landmark(other),
                        other.shape().head_dim);
  };
  if ((overlaps(others) || ...)) {
    return "two sources share memory, which would move twice: where values are the keys, or a part "
           "of them (MLA), pass the keys alone";
  }
  if constexpr (sizeof...(Others) > 0) {
    return share_memory(others...);
  } else {
    return nullptr;
  }
}

/// Null, or the error that a written page is listed more than once. for_each(f) calls f(id, whether
/// it is written) for each page in use. Calls for_each twice; with more than 1,024 written pages
/// once, and twice more for each 262,144 ids between the smallest and the largest written id. One
/// call is O(pages in use). No allocation.
template <class ForEach>
[[nodiscard]] const char* page_written_twice(const ForEach& for_each) noexcept {
  constexpr index_t few = 1024, span = index_t{1} << 18;
  index_t ids[static_cast<std::size_t>(few)];
  index_t count = 0, low = (std::numeric_limits<index_t>::max)(), high = 0;
  for_each([&](index_t id, bool is_written) {
    if (!is_written) return;
    low = id < low ? id : low;
    high = id > high ? id : high;
    if (count < few) ids[count] = id;
    ++count;
  });
  std::uint8_t marks[static_cast<std::size_t>(span / 8)] = {};
  const auto mark_of = [&](index_t id) -> std::uint8_t& { return marks[id % span / 8]; };
  const auto is_marked = [&](index_t id) { return (mark_of(id) >> id % 8 & 1) != 0; };
  const auto mark = [&](index_t id) {
    mark_of(id) = static_cast<std::uint8_t>(mark_of(id) | 1u << id % 8);
  };
  bool twice = false;
  if (count <= few) {
    std::sort(ids, ids + count);
    twice = std::adjacent_find(ids, ids + count) != ids + count;
    std::for_each(ids, ids + count, mark);  // several ids may share a mark
    for_each([&](index_t id, bool is_written) {
      twice = twice || (!is_written && is_marked(id) && std::binary_search(ids, ids + count, id));
    });
  } else {
    for (index_t base = low / span * span; base <= high && !twice; base += span) {
      std::fill(std::begin(marks), std::end(marks), std::uint8_t{0});
      const auto is_here = [&](index_t id) { return base <= id && id < base + span; };
      for_each([&](index_t id, bool is_written) {
        if (!is_written || !is_here(id)) return;
        twice = twice || is_marked(id);
        mark(id);
      });
      for_each([&](index_t id, bool is_written) {
        twice = twice || (!is_written && is_here(id) && is_marked(id));
      });
    }
  }
  return twice ? "a page that is written is in the tables twice: let a decision that keeps "
                 "everything leave all but one of its sequences out, or move sinks up"
               : nullptr;
}

inline constexpr const char* heads_share_rows =
    "KV heads share rows (a stride of 0?), which would move twice: pass one of them";

/// Null, or the error that a source names memory more than once that a compaction writes.
/// written(s, h) returns the slots that it writes. O(sequences * kv_heads), plus the cost of the
/// source's own check.
template <kv_source Source, class Written>
[[nodiscard]] constexpr const char* written_twice(const Source& source,
                                                  const Written& written) noexcept {
  using run = token_run<typename Source::element_type>;
  const index_t dims = source.shape().head_dim;
  struct {
    index_t sequence = -1, kv_head = 0, slot = 0;
  } last;  // first moved head of the last sequence that moved
  for (index_t s = 0; s < source.shape().sequences; ++s) {
    run last_head{};
    for (index_t h = 0; h < source.shape().kv_heads; ++h) {
      const token_range range = written(s, h);
      if (range.begin == range.end) continue;
      const run row = source.run_at(s, h, 0);
      if (rows_overlap(last_head, dims, row, dims)) return heads_share_rows;
      if (dims > 0 && range.end - range.begin > 1 && row.tokens > 1 && row.token_stride == 0) {
        return "tokens share a row (a stride of 0?)";
      }
      // Sequences may share rows that are not written. Sources with a `written_twice` of their own
      // (pages) know more, and check this themselves.
      const auto shares = [&](index_t slot) {
        return slot < source.tokens(last.sequence) && slot < source.tokens(s) &&
               rows_overlap(source.run_at(last.sequence, last.kv_head, slot), dims,
                            source.run_at(s, h, slot), dims);
      };
      if (!requires { source.written_twice(written); } && last_head.data == nullptr &&
          last.sequence >= 0 && (shares(range.begin) || shares(last.slot))) {
        return "sequences share rows (a stride of 0?), which would move twice: let a decision that "
               "keeps everything leave out all but one";
      }
      if (last_head.data == nullptr) last = {s, h, range.begin};
      last_head = row;
    }
  }
  if constexpr (requires { source.written_twice(written); }) {
    return source.written_twice(written);
  } else {
    return nullptr;
  }
}

/// Null, or the error that compacting the source would write memory twice.
template <kv_source Source, class Kept>
[[nodiscard]] constexpr const char* moves_twice(const Source& source, const Kept& kept,
                                                compaction mode) noexcept {
  if constexpr (std::same_as<typename Source::memory, host_memory>) {
    return written_twice(source,
                         [&](index_t s, index_t h) { return written_slots(kept, s, h, mode); });
  } else if constexpr (requires { source.repeats_heads(); }) {
    if (source.repeats_heads()) return heads_share_rows;
  }
  return nullptr;
}

/// Null, or the error that compacting the sources would write memory twice.
template <class Kept, kv_source... Sources>
[[nodiscard]] constexpr const char* aliased(const Kept& kept, compaction mode,
                                            const Sources&... sources) noexcept {
  const char* why = share_memory(sources...);
  (void)(why == nullptr && ((why = moves_twice(sources, kept, mode), why == nullptr) && ...));
  return why;
}

}  // namespace refreekv::inline v0::detail
