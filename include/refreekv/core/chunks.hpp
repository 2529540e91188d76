// SPDX-License-Identifier: Apache-2.0
// How a sequence is divided into chunks of tokens.
#pragma once

#include "refreekv/core/config.hpp"

namespace refreekv::inline v0 {

/// Tokens whose statistics are kept as one.
inline constexpr index_t chunk_tokens = 256;

/// The sinks have chunks of their own, so that their mass cannot drown the candidates' digits: the
/// first one, which may be empty, and more where there are many. The candidates' chunks follow.
/// Each has `chunk_tokens` but the last of the sinks and of the candidates.
struct chunking {
  index_t tokens;
  index_t sinks;

  /// Chunks of that many sinks: the first of the candidates.
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr index_t of_sinks(index_t sinks) noexcept {
    return sinks <= chunk_tokens ? 1 : (sinks + chunk_tokens - 1) / chunk_tokens;
  }

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t count() const noexcept {
    if (tokens <= sinks) return of_sinks(tokens);
    return of_sinks(sinks) + (tokens - sinks + chunk_tokens - 1) / chunk_tokens;
  }
  /// The chunk of a token.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t of(index_t token) const noexcept {
    if (token < sinks) return token / chunk_tokens;
    return of_sinks(sinks) + (token - sinks) / chunk_tokens;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_range operator[](
      index_t chunk) const noexcept {
    const index_t first = of_sinks(sinks);
    const bool is_sinks = chunk < first;
    const index_t begin =
        (is_sinks ? 0 : sinks) + (is_sinks ? chunk : chunk - first) * chunk_tokens;
    const index_t end = is_sinks && sinks < tokens ? sinks : tokens;
    return {begin, begin + chunk_tokens < end ? begin + chunk_tokens : end};
  }
};

}  // namespace refreekv::inline v0
