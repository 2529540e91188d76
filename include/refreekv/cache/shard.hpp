// SPDX-License-Identifier: Apache-2.0
// Context parallelism: the keys of one of several ranks, which split the tokens of a sequence.
//
// A rank reads its own chunks and writes zeros for all others. A token_exchange sums the ranks'
// bits: at most one rank holds a non-zero value of each word, so the sum is a gather. From there on
// each rank computes what a single rank would. So all ranks reach the decision of a single rank,
// bit for bit, however and in whatever order the words are summed.
#pragma once

#include "refreekv/cache/source.hpp"
#include "refreekv/core/chunks.hpp"
#include "refreekv/decision/kept_range.hpp"

namespace refreekv::inline v0 {

/// The tokens of one of `count` parts of a sequence. Parts begin and end at chunk boundaries, and
/// their numbers of candidate chunks differ by at most one. Part 0 has the sinks, too. The cost of
/// causal attention grows along the sequence; to balance it, rank r of R may have parts r and
/// 2R-1-r of 2R. O(1).
[[nodiscard]] constexpr token_range even_part(const chunking& chunks, index_t part,
                                              index_t count) noexcept {
  const index_t first = chunking::of_sinks(chunks.sinks);
  const index_t candidates = chunks.tokens > chunks.sinks ? chunks.count() - first : 0;
  const auto begin = [&](index_t i) {
    const index_t chunk = first + candidates * i / count;
    return i == 0 ? 0 : chunk < chunks.count() ? chunks[chunk].begin : chunks.tokens;
  };
  return {begin(part), begin(part + 1)};
}

namespace detail {

template <class Source>
struct element_of {
  using type = void;
};
template <row_source Source>
struct element_of<Source> {
  using type = typename Source::element_type;
};

}  // namespace detail

/// The keys of whole sequences; `source` holds one rank's tokens. Tokens are numbered along the
/// whole sequence, so causal masks, sliding windows and ALiBi are unchanged. Requires that every
/// rank observes it with the same last queries and has the same heads. Requires that the parts of
/// all ranks cover each sequence exactly once. See also `token_exchange`. (context parallelism; the
/// exchanged data are ours)
template <key_source Source>
class shard {
 public:
  using element_type = typename detail::element_of<Source>::type;
  using memory = typename Source::memory;

  /// source: the tokens of this rank alone, part after part; values are compacted by the same local
  /// ranges.
  /// parts: [sequence, part], ascending; a part may be empty. For a policy with `sinks` sinks,
  /// parts must begin and end at chunk boundaries: at sinks + k * chunk_tokens, or at the ends of
  /// the sequence.
  /// totals: [sequence], tokens on all ranks.
  /// capacity: an upper bound of the totals, in tokens. Workspaces and exchanged arrays are sized
  /// by it, so it must be equal on every rank.
  constexpr shard(const Source& source, view<const token_range, 2, memory> parts,
                  lengths_view<memory> totals, index_t capacity) noexcept
      : source_(source), parts_(parts), totals_(totals), capacity_(capacity) {}

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr cache_shape shape() const noexcept {
    return {source_.shape().sequences, source_.shape().kv_heads, capacity_,
            source_.shape().head_dim};
  }
  /// Number of tokens of the sequence on all ranks.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    return length_of(totals_, sequence, capacity_);
  }
  /// The source with this rank's tokens.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr const Source& source() const noexcept {
    return source_;
  }

  /// Whether this rank has the token. O(parts).
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool owns(index_t sequence,
                                                         index_t token) const noexcept {
    for (index_t p = 0; p < parts_.extent(1); ++p) {
      const token_range& part = parts_(sequence, p);
      if (part.begin <= token && token < part.end) return true;
    }
    return false;
  }
  /// Number of this rank's tokens before `token` in the sequence. If this rank has `token`, this is
  /// its index in `source`. O(parts).
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t local_before(index_t sequence,
                                                                    index_t token) const noexcept {
    index_t before = 0;
    for (index_t p = 0; p < parts_.extent(1); ++p) {
      const token_range& part = parts_(sequence, p);
      const index_t end = token < part.end ? token : part.end;
      if (end > part.begin) before += end - part.begin;
    }
    return before;
  }
  /// The part of a decision about the whole sequence that concerns this rank: the kept range of
  /// `source`. It is a range, because parts keep the order of tokens. The position of the next
  /// token is still all.next_position(). O(parts).
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr kept_range local_range(
      index_t sequence, const kept_range& all) const noexcept {
    return {static_cast<position_t>(local_before(sequence, all.sinks)),
            static_cast<position_t>(local_before(sequence, all.cut)),
            static_cast<position_t>(source_.tokens(sequence)),
            all.loss,
            all.dropped_mass,
            all.undecided};
  }

  /// As `run_at` of row_source. Requires owns(sequence, token).
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_run<element_type> run_at(
      index_t sequence, index_t kv_head, index_t token) const noexcept
    requires row_source<Source>
  {
    auto run = source_.run_at(sequence, kv_head, local_before(sequence, token));
    for (index_t p = 0; p < parts_.extent(1); ++p) {
      const token_range& part = parts_(sequence, p);
      const bool is_here = part.begin <= token && token < part.end;
      if (is_here && part.end - token < run.tokens) run.tokens = part.end - token;
    }
    return run;
  }

  /// Number of chunks of the sequence on this rank. O(parts).
  [[nodiscard]] constexpr index_t local_chunks(index_t sequence,
                                               const chunking& chunks) const noexcept {
    index_t count = 0;
    for (index_t p = 0; p < parts_.extent(1); ++p) {
      const auto [first, last] = chunks_of(parts_(sequence, p), chunks);
      count += last - first;
    }
    return count;
  }
  /// The i-th chunk of this rank. Requires 0 <= i < local_chunks(sequence, chunks). O(parts).
  [[nodiscard]] constexpr index_t local_chunk(index_t sequence, const chunking& chunks,
                                              index_t i) const noexcept {
    for (index_t p = 0;; ++p) {
      const auto [first, last] = chunks_of(parts_(sequence, p), chunks);
      if (i < last - first) return first + i;
      i -= last - first;
    }
  }

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (const char* why = source_.invalid()) return why;
    if (parts_.malformed() || parts_.extent(0) != shape().sequences) {
      return "parts of a shard must be [sequence, part]";
    }
    if (capacity_ < 0) return "capacity of a shard must be >= 0";
    if (const char* why = invalid_lengths(totals_, shape().sequences, capacity_)) return why;
    if constexpr (std::same_as<memory, host_memory>) {
      for (index_t s = 0; s < shape().sequences; ++s) {
        index_t end = 0;
        for (index_t p = 0; p < parts_.extent(1); ++p) {
          const token_range& part = parts_(s, p);
          if (part.begin == part.end) continue;
          if (part.begin < end || part.begin > part.end || part.end > tokens(s)) {
            return "parts of a shard must ascend within the sequence";
          }
          end = part.end;
        }
        if (local_before(s, tokens(s)) != source_.tokens(s)) {
          return "a shard's parts and its source differ in tokens";
        }
      }
    }
    return nullptr;
  }
  /// Null, or the error that a chunk lies on two ranks, for a policy with that many sinks. Checked
  /// on the host only. O(parts).
  [[nodiscard]] constexpr const char* splits_chunk(index_t sinks) const noexcept {
    if constexpr (std::same_as<memory, host_memory>) {
      for (index_t s = 0; s < shape().sequences; ++s) {
        const chunking chunks{tokens(s), sinks};
        const auto is_between = [&](index_t token) {
          return token == chunks.tokens || chunks[chunks.of(token)].begin == token;
        };
        for (index_t p = 0; p < parts_.extent(1); ++p) {
          const token_range& part = parts_(s, p);
          if (part.begin == part.end || (is_between(part.begin) && is_between(part.end))) continue;
          return "a shard's parts must begin and end where chunks do: at sinks + k * 256 tokens, "
                 "or the sequence's ends";
        }
      }
    }
    return nullptr;
  }

 private:
  struct chunk_range {
    index_t first, last;
  };
  /// The chunks of a part. An empty first chunk belongs to the part with the first token.
  [[nodiscard]] static constexpr chunk_range chunks_of(const token_range& part,
                                                       const chunking& chunks) noexcept {
    if (part.begin == part.end) return {0, 0};
    return {part.begin == 0 ? 0 : chunks.of(part.begin), chunks.of(part.end - 1) + 1};
  }

  Source source_;
  view<const token_range, 2, memory> parts_;
  lengths_view<memory> totals_;
  index_t capacity_;
};

}  // namespace refreekv::inline v0
