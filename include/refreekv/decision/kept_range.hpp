// SPDX-License-Identifier: Apache-2.0
// The result of a decision that is a range, and its conversions to masks and positions.
#pragma once

#include <type_traits>

#include "refreekv/core/view.hpp"

namespace refreekv::inline v0 {

/// The result of a decision for one sequence: it keeps a prefix and a suffix, tokens [0, sinks) and
/// [cut, tokens). 0 <= sinks <= cut <= tokens; nothing is dropped if sinks == cut.
struct kept_range {
  position_t sinks = 0;
  position_t cut = 0;
  position_t tokens = 0;
  float loss = 0;  ///< relative loss of the norm at the cut, in [0, threshold]
  /// Largest attention that any query row gives to the dropped tokens, over the window's rows and
  /// this rank's heads. The row's output changes by at most 2 * dropped_mass * max |v|. (ours)
  float dropped_mass = 0;
  /// No decision was possible: NaN or Inf in a query or a key, or no query or attention row. All
  /// tokens stay.
  bool undecided = false;

  /// Number of tokens that stay: the physical length.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr position_t length() const noexcept {
    return sinks + (tokens - cut);
  }
  /// Number of dropped tokens.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr position_t dropped() const noexcept {
    return cut - sinks;
  }
  /// The logical position of the next token. Rotary embeddings continue from here, not from
  /// length(). If the cache was pruned before, add the number of tokens dropped then.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr position_t next_position() const noexcept {
    return tokens;
  }
  /// Fraction of tokens that stay, in [0, 1]; 1 for an empty sequence.
  [[nodiscard]] constexpr double kept_fraction() const noexcept {
    return tokens == 0 ? 1.0 : static_cast<double>(length()) / tokens;
  }
  /// Whether the token at a position stays.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool keeps(index_t position) const noexcept {
    return position < sinks || position >= cut;
  }
  friend constexpr bool operator==(const kept_range&, const kept_range&) noexcept = default;
};

/// Decisions for a batch, [sequence, group].
template <class Memory = host_memory>
using kept_ranges = view<kept_range, 2, Memory>;

/// The smallest range that contains both, for engines whose layers or heads share one length.
/// Requires both to be of one sequence. loss and dropped_mass are the larger of the two: upper
/// bounds. O(1).
[[nodiscard]] constexpr kept_range unite(const kept_range& a, const kept_range& b) noexcept {
  const position_t sinks = a.sinks > b.sinks ? a.sinks : b.sinks;
  const position_t cut = a.cut < b.cut ? a.cut : b.cut;
  return {sinks,
          cut > sinks ? cut : sinks,
          a.tokens,
          a.loss > b.loss ? a.loss : b.loss,
          a.dropped_mass > b.dropped_mass ? a.dropped_mass : b.dropped_mass,
          a.undecided || b.undecided};
}

/// The smallest range that also keeps tokens [begin, end): an instruction, a tool's answer, the
/// newest turn. Extends the prefix or the suffix, whichever needs fewer tokens. loss and
/// dropped_mass are unchanged: upper bounds. Positions outside the sequence are ignored. O(1).
/// (ours)
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr kept_range protect(kept_range kept, index_t begin,
                                                                index_t end) noexcept {
  if (begin < kept.sinks) begin = kept.sinks;
  if (end > kept.cut) end = kept.cut;
  if (begin >= end) return kept;
  if (end - kept.sinks <= kept.cut - begin) {
    kept.sinks = static_cast<position_t>(end);
  } else {
    kept.cut = static_cast<position_t>(begin);
  }
  return kept;
}

/// Writes one value for each token, mask [token]. Types are bytes (1, 0), booleans, or any float
/// type for an additive mask (0, -infinity). O(tokens).
template <class T>
constexpr void write_mask(const kept_range& kept, T* mask, std::type_identity_t<T> keep,
                          std::type_identity_t<T> drop) noexcept {
  for (index_t t = 0; t < kept.tokens; ++t) mask[t] = kept.keeps(t) ? keep : drop;
}

/// Writes one bit for each token, 1 = kept, lowest bit first. bits: [ceil(tokens / 8)] bytes, the
/// last one padded with zeros. O(tokens).
constexpr void write_mask_bits(const kept_range& kept, std::uint8_t* bits) noexcept {
  for (index_t byte = 0; byte < (index_t{kept.tokens} + 7) / 8; ++byte) {
    unsigned value = 0;
    for (index_t bit = 0; bit < 8; ++bit) {
      const index_t t = byte * 8 + bit;
      value |= (t < kept.tokens && kept.keeps(t) ? 1u : 0u) << bit;
    }
    bits[byte] = static_cast<std::uint8_t>(value);
  }
}

/// Writes the kept positions of `count` ranges, ascending, one range after the other. positions:
/// [offsets[count]]. offsets: [count + 1], offsets[0] = 0. If `positions` is null only the offsets
/// are written. O(kept tokens).
template <class Position, class Offset>
constexpr void write_positions(const kept_range* kept, index_t count, Position* positions,
                               Offset* offsets) noexcept {
  index_t written = 0;
  offsets[0] = 0;
  for (index_t i = 0; i < count; ++i) {
    if (positions != nullptr) {
      Position* out = positions + written;
      for (index_t t = 0; t < kept[i].sinks; ++t) *out++ = static_cast<Position>(t);
      for (index_t t = kept[i].cut; t < kept[i].tokens; ++t) *out++ = static_cast<Position>(t);
    }
    written += kept[i].length();
    offsets[i + 1] = static_cast<Offset>(written);
  }
}

}  // namespace refreekv::inline v0
