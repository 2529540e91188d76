// SPDX-License-Identifier: Apache-2.0
// What a decision leaves of a sequence, and the forms in which engines want to hear it.
#pragma once

#include <type_traits>

#include "refreekv/view.hpp"

namespace refreekv::inline v0 {

/// A prefix and a suffix of one sequence stay: tokens [0, sinks) and [cut, tokens).
/// 0 <= sinks <= cut <= tokens; nothing is dropped where sinks == cut.
struct kept_range {
  position_t sinks = 0;
  position_t cut = 0;
  position_t tokens = 0;
  float loss = 0;  ///< of the norm, at the cut: in [0, threshold]
  float dropped_mass =
      0;  ///< the most attention that any row of the window and of this rank's heads
          ///< gives to what went; its output moves by at most
          ///< 2 * dropped_mass * max |v| (ours)
  /// There was nothing to decide on: NaN or Inf in a query or a key, or no row. All tokens stay.
  bool undecided = false;

  /// Tokens that stay: the physical length.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr position_t length() const noexcept {
    return sinks + (tokens - cut);
  }
  /// Tokens that go.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr position_t dropped() const noexcept {
    return cut - sinks;
  }
  /// The logical position of the next token: rotary embeddings go on from here, not from length().
  /// If the cache had been pruned before, add what was dropped then.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr position_t next_position() const noexcept {
    return tokens;
  }
  /// In [0, 1]; 1 for an empty sequence.
  [[nodiscard]] constexpr double kept_fraction() const noexcept {
    return tokens == 0 ? 1.0 : static_cast<double>(length()) / tokens;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool keeps(index_t position) const noexcept {
    return position < sinks || position >= cut;
  }
  friend constexpr bool operator==(const kept_range&, const kept_range&) noexcept = default;
};

/// [sequence, group]: decisions about whole batches.
template <class Memory = host_memory>
using kept_ranges = view<kept_range, 2, Memory>;

/// The smallest range that holds both, for engines whose layers or heads share one length.
/// Requires both of one sequence; loss and mass are of the tighter cut, so upper bounds.
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

/// The smallest range that also holds tokens [begin, end): an instruction, a tool's answer, the
/// newest turn. Either the prefix or the suffix grows, whichever takes fewer tokens. Loss and mass
/// stay, as upper bounds; what is outside the sequence is no token of it. (ours)
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

/// A mask of one value for each token, mask [token]: bytes (1, 0), booleans, or an additive mask of
/// any float type (0, -infinity). O(tokens).
template <class T>
constexpr void write_mask(const kept_range& kept, T* mask, std::type_identity_t<T> keep,
                          std::type_identity_t<T> drop) noexcept {
  for (index_t t = 0; t < kept.tokens; ++t) mask[t] = kept.keeps(t) ? keep : drop;
}

/// One bit for each token, 1 = kept, lowest bit first; bits [ceil(tokens / 8)] bytes, the last one
/// padded with zeros. O(tokens).
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

/// Kept positions of `count` ranges, ascending, one range after the other: positions
/// [offsets[count]], offsets [count + 1], offsets[0] = 0. With no `positions` only the offsets are
/// written. O(kept tokens).
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

/// How what is kept becomes contiguous. Keys carry their own rotation, so the order of slots does
/// not matter to attention.
enum class compaction {
  sinks_up,     ///< what precedes the suffix moves up to it: the last slot stays tokens - 1 (ours)
  suffix_down,  ///< what stays moves down to slot 0
};

/// Copy tokens [source, source + tokens) to [target, target + tokens), as if through a buffer.
struct token_move {
  index_t source;
  index_t target;  ///< <= source for suffix_down: safe in ascending order
  index_t tokens;
};

[[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_move move_of(const kept_range& kept,
                                                                compaction how) noexcept {
  const index_t sinks = kept.sinks, cut = kept.cut, tokens = kept.tokens;
  if (how == compaction::sinks_up) return {0, cut - sinks, cut == sinks ? 0 : sinks};
  return {cut, sinks, cut == sinks ? 0 : tokens - cut};
}

/// The slot of the first kept token of a kept_range or kept_count once `how` is done; the others
/// follow it.
template <class Kept>
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t first_slot(const Kept& kept,
                                                                compaction how) noexcept {
  return how == compaction::sinks_up ? index_t{kept.dropped()} : 0;
}

/// Which pages also belong to others, so must be neither written nor freed: bit i, lowest first, is
/// page i of the sequence; null where none does.
using shared_pages = const std::uint8_t*;

[[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool is_shared(shared_pages shared,
                                                            index_t page) noexcept {
  return shared != nullptr && (shared[page / 8] >> (page % 8) & 1) != 0;
}

/// Pages that a sequence can give up whole. Pages are counted along the sequence, page i holds
/// tokens [i * page_tokens, (i + 1) * page_tokens).
struct page_plan {
  index_t first = 0;        ///< pages [first, last) leave the sequence's page table
  index_t last = 0;         ///< so the table loses last - first entries
  index_t freed = 0;        ///< those of them that nobody shares
  bool sinks_move = false;  ///< first compact with sinks_up; otherwise sinks stay in their page and
                            ///< tokens between them and the cut must be masked
  index_t first_slot = 0;   ///< of the kept tokens in the new table
  /// Pages [written_first, written_last) of the table as it was are those that sinks move to; none
  /// where sinks stay. A cache of prefixes must drop their hashes, or mark them as shared before it
  /// plans if it is to offer them any longer. What is freed is still what its hash says.
  index_t written_first = 0;
  index_t written_last = 0;
};

namespace detail {

/// What plan_pages chooses from; how many pages nobody shares is not counted yet.
struct page_choice {
  page_plan stay = {};
  page_plan move = {};

  /// Given how many pages nobody shares of those that `stay` and `move` take out, and of those that
  /// `move` writes.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr page_plan best(
      index_t stay_private, index_t move_private, index_t written_private) const noexcept {
    const bool moves =
        written_private == move.written_last - move.written_first && move_private > stay_private;
    page_plan plan = moves ? move : stay;
    plan.freed = moves ? move_private : stay_private;
    return plan;
  }
};

[[nodiscard]] REFREEKV_HOST_DEVICE constexpr page_choice choose_pages(
    const kept_range& kept, index_t page_tokens) noexcept {
  const index_t sinks = kept.sinks, cut = kept.cut;
  const auto pages = [&](index_t tokens) { return (tokens + page_tokens - 1) / page_tokens; };
  if (sinks == cut) return {};
  const index_t first = pages(sinks), last = cut < kept.tokens ? cut / page_tokens : pages(cut);
  page_choice choice{.stay = {.first = first, .last = last < first ? first : last}};
  if (sinks == 0) {
    choice.stay.first_slot = cut < kept.tokens ? cut % page_tokens : 0;
  } else {
    const index_t target = cut - sinks;
    choice.move = {.last = target / page_tokens,
                   .sinks_move = true,
                   .first_slot = target % page_tokens,
                   .written_first = target / page_tokens,
                   .written_last = pages(cut)};
  }
  return choice;
}

/// Pages [first, last) that nobody shares.
[[nodiscard]] constexpr index_t private_pages(shared_pages shared, index_t first,
                                              index_t last) noexcept {
  if (shared == nullptr) return last - first;
  index_t count = 0;
  for (index_t page = first; page < last; ++page) count += is_shared(shared, page) ? 0 : 1;
  return count;
}

}  // namespace detail

/// The sinks move if that frees more pages and writes no shared one.
/// Requires page_tokens >= 1. O(dropped pages). (ours)
[[nodiscard]] constexpr page_plan plan_pages(const kept_range& kept, index_t page_tokens,
                                             shared_pages shared = nullptr) noexcept {
  const detail::page_choice choice = detail::choose_pages(kept, page_tokens);
  const auto count = [&](index_t first, index_t last) {
    return detail::private_pages(shared, first, last);
  };
  return choice.best(count(choice.stay.first, choice.stay.last), count(0, choice.move.last),
                     count(choice.move.written_first, choice.move.written_last));
}

/// Takes the plan's pages out of table [page], whose `pages` entries shift down, and appends those
/// that nobody shares to `freed` [plan.freed]: they are the caller's to reuse. Returns how many.
/// O(pages).
template <class Index>
constexpr index_t remove_pages(const page_plan& plan, Index* table, index_t pages, Index* freed,
                               shared_pages shared = nullptr) noexcept {
  index_t count = 0;
  for (index_t page = plan.first; page < plan.last; ++page) {
    if (!is_shared(shared, page)) freed[count++] = table[page];
  }
  for (index_t page = plan.last; page < pages; ++page) {
    table[plan.first + page - plan.last] = table[page];
  }
  return count;
}

}  // namespace refreekv::inline v0
