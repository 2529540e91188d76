// SPDX-License-Identifier: Apache-2.0
// Checks of a decision by itself, without a cache. Each returns null, or the error in words.
#pragma once

#include <concepts>
#include <initializer_list>

#include "refreekv/decision/kept_positions.hpp"

namespace refreekv::inline v0::detail {

/// Returns the first reason that is not null, or null.
[[nodiscard]] constexpr const char* first_of(std::initializer_list<const char*> reasons) noexcept {
  for (const char* why : reasons) {
    if (why != nullptr) return why;
  }
  return nullptr;
}

/// Checks the shape of a decision, ranges or positions. Reads no elements, so it also checks
/// decisions on a device.
template <class Memory>
[[nodiscard]] constexpr const char* misshapen(const view<kept_range, 2, Memory>& kept,
                                              index_t sequences, index_t groups, index_t) noexcept {
  if (kept.malformed() || kept.extent(0) != sequences || kept.extent(1) != groups) {
    return "kept must be [sequence, group]; groups are the policy's: 1 or kv_heads";
  }
  return nullptr;
}
template <class Memory>
[[nodiscard]] constexpr const char* misshapen(const kept_positions<Memory>& kept, index_t sequences,
                                              index_t groups, index_t capacity) noexcept {
  const auto& [positions, counts] = kept;
  if (counts.malformed() || counts.extent(0) != sequences || counts.extent(1) != groups) {
    return "kept counts must be [sequence, kv_head]";
  }
  if (positions.malformed() || positions.extent(0) != sequences || positions.extent(1) != groups ||
      positions.extent(2) < capacity) {
    return "kept positions must be [sequence, kv_head, capacity]";
  }
  return nullptr;
}

/// Checks the elements of ranges [sequence, group], with any number of groups. holds(s, tokens)
/// says whether sequence s may have that many tokens. Elements on a device are not checked.
template <class Memory, class Holds>
[[nodiscard]] constexpr const char* unfit_tokens(const view<const kept_range, 2, Memory>& kept,
                                                 const Holds& holds) noexcept {
  if constexpr (std::same_as<Memory, host_memory>) {
    for (index_t s = 0; s < kept.extent(0); ++s) {
      for (index_t g = 0; g < kept.extent(1); ++g) {
        const kept_range& k = kept(s, g);
        if (k.sinks < 0 || k.sinks > k.cut || k.cut > k.tokens) {
          return "a kept range needs 0 <= sinks <= cut <= tokens";
        }
        if (!holds(s, index_t{k.tokens})) return "a kept range is of another number of tokens";
      }
    }
  }
  return nullptr;
}

/// As `unfit_tokens` of ranges, but for positions [sequence, kv_head, ...], which must ascend.
template <class Memory, class Holds>
[[nodiscard]] constexpr const char* unfit_tokens(const kept_positions<Memory>& kept,
                                                 const Holds& holds) noexcept {
  if constexpr (std::same_as<Memory, host_memory>) {
    for (index_t s = 0; s < kept.counts.extent(0); ++s) {
      for (index_t h = 0; h < kept.counts.extent(1); ++h) {
        const kept_tokens& k = kept.counts(s, h);
        if (k.count < 0 || k.count > kept.positions.extent(2)) {
          return "a kept count is outside [0, capacity]";
        }
        if (!holds(s, index_t{k.tokens})) return "a kept count is of another number of tokens";
        index_t last = -1;
        for (index_t i = 0; i < k.count; ++i) {
          const index_t position = kept.positions(s, h, i);
          if (position <= last || position >= k.tokens) {
            return "kept positions must ascend within [0, tokens)";
          }
          last = position;
        }
      }
    }
  }
  return nullptr;
}

/// Checks the shape of stand-in rows that must have room for `most` stand-ins of a KV head.
template <class Memory>
[[nodiscard]] constexpr const char* misshapen_rows(const view<float, 4, Memory>& rows,
                                                   const view<position_t, 2, Memory>& counts,
                                                   index_t head_dim, index_t most) noexcept {
  if (rows.malformed() || rows.extent(0) != counts.extent(0) ||
      rows.extent(1) != counts.extent(1) || rows.extent(2) < most || rows.extent(3) != head_dim ||
      (head_dim > 1 && rows.stride(3) != 1)) {
    return "stand-ins must be [sequence, kv_head, stand_in, head_dim], rows contiguous, with a "
           "place for each that there may be";
  }
  return nullptr;
}

/// Whether a view has `sequences` sequences (first axis) and contiguous rows (last axis).
template <class T, std::size_t Rank, class Memory>
[[nodiscard]] constexpr bool has_rows(const view<T, Rank, Memory>& rows,
                                      index_t sequences) noexcept {
  return !rows.malformed() && rows.extent(0) == sequences &&
         (rows.extent(Rank - 1) <= 1 || rows.stride(Rank - 1) == 1);
}

/// Checks shape and elements of ranges [sequence, group]. No range may have more than `tokens`
/// tokens.
template <class Memory>
[[nodiscard]] constexpr const char* unfit_ranges(const view<const kept_range, 2, Memory>& kept,
                                                 index_t sequences, index_t groups,
                                                 index_t tokens) noexcept {
  if (kept.malformed() || kept.extent(0) != sequences || kept.extent(1) != groups) {
    return "kept must be [sequence, group], with as many of each as there are to write";
  }
  return unfit_tokens(kept, [&](index_t, index_t of) { return of <= tokens; });
}

/// As `unfit_ranges`, but for positions [sequence, kv_head, ...].
template <class Memory>
[[nodiscard]] constexpr const char* unfit_positions(const kept_positions<Memory>& kept,
                                                    index_t sequences, index_t kv_heads,
                                                    index_t tokens) noexcept {
  if (const char* why = misshapen(kept, sequences, kv_heads, 0)) return why;
  return unfit_tokens(kept, [&](index_t, index_t of) { return of <= tokens; });
}

}  // namespace refreekv::inline v0::detail
