// SPDX-License-Identifier: Apache-2.0
// The division of a sequence into chunks of 256 tokens.
#pragma once

#include "refreekv/core/config.hpp"

namespace refreekv::inline v0 {

/// Tokens of a chunk: attention statistics are kept per chunk.
inline constexpr index_t chunk_tokens = 256;

/// The chunks of one sequence. Sinks and candidates (all other tokens) never share a chunk: the
/// sinks' attention mass would cost the candidates' sums their digits. The sinks' chunks come
/// first: one, which may be empty, or more if there are more than `chunk_tokens` sinks. The
/// candidates' chunks follow. A chunk has `chunk_tokens` tokens; only the last one of the sinks and
/// the last one of the candidates may have fewer.
struct chunking {
  index_t tokens;
  index_t sinks;

  /// Number of chunks of `sinks` sinks. It is also the index of the first chunk of candidates.
  [[nodiscard]] REFREEKV_HOST_DEVICE static constexpr index_t of_sinks(index_t sinks) noexcept {
    return sinks <= chunk_tokens ? 1 : (sinks + chunk_tokens - 1) / chunk_tokens;
  }

  /// Number of chunks of the sequence, at least 1.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t count() const noexcept {
    if (tokens <= sinks) return of_sinks(tokens);
    return of_sinks(sinks) + (tokens - sinks + chunk_tokens - 1) / chunk_tokens;
  }
  /// Index of the chunk that holds a token.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t of(index_t token) const noexcept {
    if (token < sinks) return token / chunk_tokens;
    return of_sinks(sinks) + (token - sinks) / chunk_tokens;
  }
  /// The tokens of a chunk. Requires 0 <= chunk < count().
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
