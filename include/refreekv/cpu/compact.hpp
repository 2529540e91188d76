// SPDX-License-Identifier: Apache-2.0
// Moving the rows of a cache on the CPU, whatever its layout.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "refreekv/cache.hpp"
#include "refreekv/kept_positions.hpp"

namespace refreekv::inline v0::cpu_detail {

/// Copies `count` rows that two runs hold; ranges may overlap if `to` is not above `from`.
template <class T>
void copy_rows(const token_run<T>& to, const token_run<T>& from, index_t count,
               index_t head_dim) noexcept {
  static_assert(std::is_trivially_copyable_v<T> && !std::is_const_v<T>,
                "compaction needs a cache that can be written");
  const auto bytes = [](index_t n) { return static_cast<std::size_t>(n) * sizeof(T); };
  if (to.dim_stride != 1 || from.dim_stride != 1) {
    for (index_t t = 0; t < count; ++t) {
      for (index_t d = 0; d < head_dim; ++d) {
        to.data[t * to.token_stride + d * to.dim_stride] =
            from.data[t * from.token_stride + d * from.dim_stride];
      }
    }
  } else if (to.token_stride == head_dim && from.token_stride == head_dim) {
    std::memmove(to.data, from.data, bytes(count * head_dim));
  } else {
    for (index_t t = 0; t < count; ++t) {
      std::memmove(to.data + t * to.token_stride, from.data + t * from.token_stride,
                   bytes(head_dim));
    }
  }
}

/// Moves rows of one (sequence, kv_head) within its cache, as if through a buffer.
template <kv_source Source>
void move_rows(const Source& source, index_t sequence, index_t kv_head, token_move move) noexcept {
  const auto run = [&](index_t token) { return source.run_at(sequence, kv_head, token); };
  if (move.target <= move.source) {
    for (index_t done = 0; done < move.tokens;) {
      const auto from = run(move.source + done);
      const auto to = run(move.target + done);
      const index_t count = std::min({move.tokens - done, from.tokens, to.tokens});
      copy_rows(to, from, count, source.head_dim());
      done += count;
    }
  } else {
    for (index_t t = move.tokens - 1; t >= 0; --t) {
      copy_rows(run(move.target + t), run(move.source + t), 1, source.head_dim());
    }
  }
}

/// Gathers the kept rows of one (sequence, kv_head) within its cache.
template <kv_source Source>
void gather_rows(const Source& source, index_t sequence, index_t kv_head,
                 const kept_positions<>& kept, compaction how) noexcept {
  const kept_count& k = kept.counts(sequence, kv_head);
  const index_t first = first_slot(k, how);
  const auto move = [&](index_t i) {
    const index_t position = kept.positions(sequence, kv_head, i);
    if (position == first + i) return;
    copy_rows(source.run_at(sequence, kv_head, first + i),
              source.run_at(sequence, kv_head, position), 1, source.head_dim());
  };
  // Never over a row that is still to move.
  if (how == compaction::suffix_down) {
    for (index_t i = 0; i < k.count; ++i) move(i);
  } else {
    for (index_t i = k.count - 1; i >= 0; --i) move(i);
  }
}

}  // namespace refreekv::inline v0::cpu_detail
