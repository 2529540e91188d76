// SPDX-License-Identifier: Apache-2.0
// Whether a decision fits the caches that it is about: null, or what is wrong, in words.
#pragma once

#include <initializer_list>

#include "refreekv/cache.hpp"
#include "refreekv/kept_positions.hpp"

namespace refreekv::inline v0::detail {

/// The first of several reasons, or null.
[[nodiscard]] constexpr const char* first_of(std::initializer_list<const char*> reasons) noexcept {
  for (const char* why : reasons) {
    if (why != nullptr) return why;
  }
  return nullptr;
}

/// The shape alone, which is also known of a device's.
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

/// The ranges [sequence, group] of as many groups as there are; holds(s, tokens): whether a
/// sequence may have so many tokens.
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

/// The same of positions [sequence, kv_head, ...], which ascend.
template <class Memory, class Holds>
[[nodiscard]] constexpr const char* unfit_tokens(const kept_positions<Memory>& kept,
                                                 const Holds& holds) noexcept {
  if constexpr (std::same_as<Memory, host_memory>) {
    for (index_t s = 0; s < kept.counts.extent(0); ++s) {
      for (index_t h = 0; h < kept.counts.extent(1); ++h) {
        const kept_count& k = kept.counts(s, h);
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

/// Of ranges that are about a source's sequences.
template <kv_source Source>
[[nodiscard]] constexpr const char* unfit(
    const view<const kept_range, 2, typename Source::memory>& kept, const Source& source) noexcept {
  if (const char* why = source.invalid()) return why;
  if (kept.malformed() || kept.extent(0) != source.sequences() ||
      (kept.extent(1) != 1 && kept.extent(1) != source.kv_heads())) {
    return "kept must be [sequence, 1 or kv_head] of each source";
  }
  return unfit_tokens(kept, [&](index_t s, index_t tokens) { return tokens == source.tokens(s); });
}

/// Of positions.
template <kv_source Source>
[[nodiscard]] constexpr const char* unfit(const kept_positions<typename Source::memory>& kept,
                                          const Source& source) noexcept {
  if (const char* why = source.invalid()) return why;
  if (const char* why = misshapen(kept, source.sequences(), source.kv_heads(), 0)) return why;
  return unfit_tokens(kept, [&](index_t s, index_t tokens) { return tokens == source.tokens(s); });
}

/// Whether `values` hold the same sequences as `keys`.
template <kv_source Values, key_source Keys>
[[nodiscard]] constexpr const char* differ(const Values& values, const Keys& keys) noexcept {
  if (const char* why = values.invalid()) return why;
  if (values.sequences() != keys.sequences()) return "values and keys differ in sequences";
  if (values.kv_heads() != keys.kv_heads()) return "values and keys differ in kv_heads";
  if constexpr (std::same_as<typename Keys::memory, host_memory>) {
    for (index_t s = 0; s < keys.sequences(); ++s) {
      if (values.tokens(s) != keys.tokens(s)) return "values and keys differ in tokens";
    }
  }
  return nullptr;
}

}  // namespace refreekv::inline v0::detail
