// SPDX-License-Identifier: Apache-2.0
// A source in up to three runs of slots (a ring, or sinks and a ring): the keys or the values of
// one layer.
#pragma once

#include "refreekv/cache/source.hpp"

namespace refreekv::inline v0 {

/// The slots [begin, begin + tokens) of a segmented cache.
struct segment {
  position_t begin;
  position_t tokens;
};

/// A dense tensor whose tokens are in up to three runs of slots, in time order. A ring buffer that
/// has wrapped around is [head, end), then [0, head); sinks and such a ring are three runs.
template <class T, class Memory = host_memory>
class segmented {
 public:
  using element_type = T;
  using memory = Memory;

  /// rows: [sequence, kv_head, slot, head_dim]; segments: [sequence, 1 to 3].
  constexpr segmented(view<T, 4, Memory> rows, view<const segment, 2, Memory> segments) noexcept
      : slots_(rows), segments_(segments) {}

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr cache_shape shape() const noexcept {
    return {slots_.extent(0), slots_.extent(1), slots_.extent(2), slots_.extent(3)};
  }

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    index_t tokens = 0;
    for (index_t i = 0; i < segments_.extent(1); ++i) tokens += segments_(sequence, i).tokens;
    return at_most(slots_.extent(2), tokens);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_run<T> run_at(index_t sequence,
                                                                   index_t kv_head,
                                                                   index_t token) const noexcept {
    index_t i = 0;
    while (token >= segments_(sequence, i).tokens) token -= segments_(sequence, i++).tokens;
    const segment& part = segments_(sequence, i);
    return {slots_.at(sequence, kv_head, part.begin + token), part.tokens - token, slots_.stride(2),
            slots_.stride(3)};
  }
  /// The first row of the tensor. Needs no lengths or tables, which may be in device memory.
  [[nodiscard]] constexpr token_run<T> first_slot_row() const noexcept {
    return {slots_.data(), 0, slots_.stride(2), slots_.stride(3)};
  }
  /// Whether all KV heads are the same memory.
  [[nodiscard]] constexpr bool repeats_heads() const noexcept {
    return slots_.extent(1) > 1 && slots_.stride(1) == 0;
  }
  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (slots_.malformed()) return "segmented slots need a pointer and extents >= 0";
    if (segments_.malformed() || segments_.extent(0) != slots_.extent(0) ||
        segments_.extent(1) < 1 || segments_.extent(1) > 3) {
      return "segments must be [sequence, 1 to 3]";
    }
    if constexpr (std::same_as<Memory, host_memory>) {
      for (index_t s = 0; s < slots_.extent(0); ++s) {
        for (index_t i = 0; i < segments_.extent(1); ++i) {
          const segment& part = segments_(s, i);
          if (part.begin < 0 || part.tokens < 0 ||
              index_t{part.begin} + part.tokens > slots_.extent(2)) {
            return "a segment is outside the slots";
          }
          for (index_t j = 0; j < i; ++j) {
            const segment& other = segments_(s, j);
            if (part.tokens > 0 && other.tokens > 0 &&
                part.begin < index_t{other.begin} + other.tokens &&
                other.begin < index_t{part.begin} + part.tokens) {
              return "segments overlap";
            }
          }
        }
      }
    }
    return nullptr;
  }

 private:
  view<T, 4, Memory> slots_;
  view<const segment, 2, Memory> segments_;
};

}  // namespace refreekv::inline v0
