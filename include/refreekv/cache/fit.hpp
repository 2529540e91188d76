// SPDX-License-Identifier: Apache-2.0
// Checks of a decision against the caches that it is for. Each returns null, or the error in words.
#pragma once

#include "refreekv/cache/source.hpp"
#include "refreekv/decision/checks.hpp"
#include "refreekv/decision/stand_ins.hpp"

namespace refreekv::inline v0::detail {

/// Checks ranges [sequence, 1 or kv_head] against a source. On the host each range must have as
/// many tokens as its sequence.
template <kv_source Source>
[[nodiscard]] constexpr const char* unfit(
    const view<const kept_range, 2, typename Source::memory>& kept, const Source& source) noexcept {
  if (const char* why = source.invalid()) return why;
  if (kept.malformed() || kept.extent(0) != source.shape().sequences ||
      (kept.extent(1) != 1 && kept.extent(1) != source.shape().kv_heads)) {
    return "kept must be [sequence, 1 or kv_head] of each source";
  }
  return unfit_tokens(kept, [&](index_t s, index_t tokens) { return tokens == source.tokens(s); });
}

/// As `unfit` of ranges, but for positions [sequence, kv_head, ...].
template <kv_source Source>
[[nodiscard]] constexpr const char* unfit(const kept_positions<typename Source::memory>& kept,
                                          const Source& source) noexcept {
  if (const char* why = source.invalid()) return why;
  if (const char* why = misshapen(kept, source.shape().sequences, source.shape().kv_heads, 0))
    return why;
  return unfit_tokens(kept, [&](index_t s, index_t tokens) { return tokens == source.tokens(s); });
}

/// Null, or in what `values` and `keys` differ: sequences, kv_heads, or on the host tokens.
/// O(sequences).
template <kv_source Values, key_source Keys>
[[nodiscard]] constexpr const char* differ(const Values& values, const Keys& keys) noexcept {
  if (const char* why = values.invalid()) return why;
  if (values.shape().sequences != keys.shape().sequences)
    return "values and keys differ in sequences";
  if (values.shape().kv_heads != keys.shape().kv_heads) return "values and keys differ in kv_heads";
  if constexpr (std::same_as<typename Keys::memory, host_memory>) {
    for (index_t s = 0; s < keys.shape().sequences; ++s) {
      if (values.tokens(s) != keys.tokens(s)) return "values and keys differ in tokens";
    }
  }
  return nullptr;
}

/// Checks that stand-ins fit the sources to which they are written. O(sequences * kv_heads).
template <kv_source Keys, kv_source Values>
[[nodiscard]] constexpr const char* unfit(const kept_with_stand_ins<typename Keys::memory>& kept,
                                          const Keys& keys, const Values& values) noexcept {
  const auto& [key_rows, value_rows, counts] = kept.stand_ins;
  if (counts.malformed() || counts.extent(0) != keys.shape().sequences ||
      counts.extent(1) != keys.shape().kv_heads) {
    return "stand-in counts must be [sequence, kv_head]";
  }
  if (const char* why = misshapen_rows(key_rows, counts, keys.shape().head_dim, 0)) return why;
  if (const char* why = misshapen_rows(value_rows, counts, values.shape().head_dim, 0)) return why;
  if constexpr (std::same_as<typename Keys::memory, host_memory>) {
    for (index_t s = 0; s < keys.shape().sequences; ++s) {
      for (index_t h = 0; h < keys.shape().kv_heads; ++h) {
        if (counts(s, h) < 0 || counts(s, h) > kept.counts(s, h).dropped() ||
            counts(s, h) > key_rows.extent(2) || counts(s, h) > value_rows.extent(2)) {
          return "more stand-ins than tokens that go, or than rows";
        }
      }
    }
  }
  return nullptr;
}

}  // namespace refreekv::inline v0::detail
