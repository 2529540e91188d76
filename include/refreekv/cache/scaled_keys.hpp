// SPDX-License-Identifier: Apache-2.0
// Keys in 8 bits, with one scale for each token.
#pragma once

#include "refreekv/cache/source.hpp"

namespace refreekv::inline v0 {

/// A key is its row times the scale of its token. Rows are int8 or fp8 e4m3, in any layout. Scales
/// are a source of float with head_dim 1. Compact the two as separate sources.
template <kv_source Rows, kv_source Scales>
  requires std::same_as<typename Rows::memory, typename Scales::memory>
struct scaled_keys {
  using memory = typename Rows::memory;

  Rows rows;
  Scales scales;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr cache_shape shape() const noexcept {
    return rows.shape();
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    return rows.tokens(sequence);
  }
  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (const char* why = rows.invalid()) return why;
    if (const char* why = scales.invalid()) return why;
    if (scales.shape().sequences != rows.shape().sequences ||
        scales.shape().kv_heads != rows.shape().kv_heads) {
      return "scales and keys differ in sequences or kv_heads";
    }
    if (scales.shape().head_dim != 1) return "scales must have a head_dim of 1";
    if constexpr (std::same_as<memory, host_memory>) {
      for (index_t s = 0; s < rows.shape().sequences; ++s) {
        if (scales.tokens(s) != tokens(s)) return "scales and keys differ in tokens";
      }
    }
    return nullptr;
  }
};
template <class Rows, class Scales>
scaled_keys(Rows, Scales) -> scaled_keys<Rows, Scales>;

}  // namespace refreekv::inline v0
