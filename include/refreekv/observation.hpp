// SPDX-License-Identifier: Apache-2.0
// What a policy gets to see of one layer: its cache and, for those that ask, attention to it.
#pragma once

#include "refreekv/attention.hpp"
#include "refreekv/cache.hpp"
#include "refreekv/scores.hpp"

namespace refreekv::inline v0 {

/// Which rows of an observation's window exist, and what they see, where that is not every row and
/// all tokens up to its own. Both views may have strides, and neither is read past the sequences.
template <class Memory = host_memory>
struct window_rows {
  /// [sequence], in [0, window]: the last counts(s) rows are the sequence's, and the values of
  /// those before them do not matter. No pointer: all rows exist. For sequences that bring
  /// different numbers of queries in one batch: decoding beside a prefill, hits of a prefix cache,
  /// the short last piece of a prompt, drafts that are verified.
  lengths_view<Memory> counts = {};
  /// [sequence, window], in [1, tokens(s)]: the row sees tokens [0, ends(s, r)). No pointer:
  /// attention is causal along the cache. For prefixes that see each other (PaliGemma, the images
  /// of Gemma 3), and for cross attention: there all see all, which the lengths are with a stride
  /// of 0 along the window. Sliding windows and ALiBi still go by tokens(s) - window + r.
  view<const position_t, 2, Memory> ends = {};
};

/// A layer number that nobody gave.
inline constexpr index_t unknown_layer = -1;

/// What the layer is, besides its tensors.
template <class Memory = host_memory>
struct layer_info {
  /// 0-based. Rules that treat layers differently ask for it; it has no default, as every layer
  /// would be the first one.
  index_t layer = unknown_layer;
  attention_params<Memory> attention = {};
  window_rows<Memory> rows = {};
};

/// One layer of a ragged batch. All sizes are of the whole batch but tokens(sequence).
/// - `invalid()`: null, or what is wrong with the description, in words. O(tables).
template <class O>
concept observation = requires(const O& seen, index_t sequence) {
  typename O::memory;
  { seen.sequences() } -> std::same_as<index_t>;
  { seen.q_heads() } -> std::same_as<index_t>;
  { seen.kv_heads() } -> std::same_as<index_t>;
  { seen.capacity() } -> std::same_as<index_t>;
  { seen.tokens(sequence) } -> std::same_as<index_t>;
  { seen.invalid() } -> std::same_as<const char*>;
  { seen.info } -> std::convertible_to<layer_info<typename O::memory>>;
};

/// An observation that shows attention: the last `window()` rows of each query head.
template <class O>
concept attention_observation = observation<O> && requires(const O& seen) {
  { seen.window() } -> std::same_as<index_t>;
};

/// An observation of keys whose tokens are split over ranks: see shard.hpp.
template <class O>
concept sharded = observation<O> && requires(const O& seen) {
  requires sharded_source<std::remove_cvref_t<decltype(seen.keys)>>;
};

/// Whether the chunk that begins with that token is on this rank.
template <class O>
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool has_chunk_at(
    [[maybe_unused]] const O& seen, [[maybe_unused]] index_t sequence,
    [[maybe_unused]] index_t token) noexcept {
  if constexpr (sharded<O>) {
    return seen.keys.owns(sequence, token);
  } else {
    return true;
  }
}

namespace detail {

template <class O>
[[nodiscard]] constexpr const char* invalid_layer(const O& seen) noexcept {
  if (seen.capacity() > max_count) return "a sequence may have 2^31 - 1 tokens at most";
  if (seen.sequences() > max_count) return "a batch may have 2^31 - 1 sequences at most";
  if (seen.info.layer < unknown_layer) return "layer must be >= 0";
  if (seen.kv_heads() < 1) return "kv_heads must be >= 1";
  if (seen.q_heads() < 1 || seen.q_heads() > max_count) return "q_heads must be in [1, 2^31 - 1]";
  if (seen.q_heads() % seen.kv_heads() != 0) return "q_heads must be a multiple of kv_heads";
  return nullptr;
}

template <class O>
[[nodiscard]] constexpr const char* invalid_window(const O& seen) noexcept {
  const auto& [counts, ends] = seen.info.rows;
  if (counts.data() != nullptr && (counts.malformed() || counts.extent(0) != seen.sequences())) {
    return "row counts must be [sequence]";
  }
  if (ends.data() != nullptr &&
      (ends.malformed() || ends.extent(0) != seen.sequences() || ends.extent(1) != seen.window())) {
    return "row ends must be [sequence, window]";
  }
  if constexpr (std::same_as<typename O::memory, host_memory>) {
    for (index_t s = 0; s < seen.sequences(); ++s) {
      if (counts.data() != nullptr && (counts(s) < 0 || counts(s) > seen.window())) {
        return "a row count is outside [0, window]";
      }
      if (seen.tokens(s) == 0) continue;
      if (counts.data() == nullptr && seen.window() < 1) return "a window of no rows";
      const index_t there = counts.data() == nullptr ? seen.window() : index_t{counts(s)};
      for (index_t r = seen.window() - there; ends.data() != nullptr && r < seen.window(); ++r) {
        if (ends(s, r) < 1 || ends(s, r) > seen.tokens(s))
          return "a row end is outside [1, tokens]";
      }
    }
  }
  return nullptr;
}

template <class O>
[[nodiscard]] constexpr const char* invalid_scores(const scores_view<typename O::memory>& scores,
                                                   const O& seen) noexcept {
  if (scores.malformed() || scores.extent(0) != seen.sequences() ||
      scores.extent(1) != seen.kv_heads() || scores.extent(2) < seen.capacity()) {
    return "scores must be [sequence, kv_head, capacity]";
  }
  return nullptr;
}

}  // namespace detail

/// The last `rows` rows of a sequence's window. Requires 0 <= rows <= seen.window().
template <class Seen>
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr query_window window_of(const Seen& seen,
                                                                    index_t sequence,
                                                                    index_t rows) noexcept {
  query_window window{seen.tokens(sequence), rows, seen.info.attention.sliding_window};
  const auto& [counts, ends] = seen.info.rows;
  if (counts.data() != nullptr) {
    const index_t there = counts(sequence);
    window.missing = there < 0 ? rows : there < rows ? rows - there : 0;
  }
  if (ends.data() != nullptr) {
    window.ends = ends.at(sequence, seen.window() - rows);
    window.ends_stride = ends.stride(1);
  }
  return window;
}

/// Keys and the last queries: attention is recomputed from them, no attention matrix is needed.
template <class Query, key_source Keys>
struct query_observation {
  using memory = typename Keys::memory;

  /// [sequence, window, q_head, head_dim], rotated as the keys are; the last row is the query of
  /// the sequence's last token, whatever its length. Which rows exist: info.rows.
  view<const Query, 4, memory> queries;
  Keys keys;
  layer_info<memory> info;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t sequences() const noexcept {
    return keys.sequences();
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t q_heads() const noexcept {
    return queries.extent(2);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t kv_heads() const noexcept {
    return keys.kv_heads();
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t head_dim() const noexcept {
    return keys.head_dim();
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t capacity() const noexcept {
    return keys.capacity();
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t window() const noexcept {
    return queries.extent(1);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    return keys.tokens(sequence);
  }

  /// Multiplies q.k: the model's scale, or its default.
  [[nodiscard]] REFREEKV_HOST_DEVICE float scale() const noexcept {
    return info.attention.scale > 0 ? info.attention.scale
                                    : 1.0f / std::sqrt(static_cast<float>(keys.head_dim()));
  }

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (const char* why = keys.invalid()) return why;
    if (const char* why = detail::invalid_layer(*this)) return why;
    if (queries.malformed()) return "queries need a pointer and extents >= 0";
    if (queries.extent(0) != keys.sequences()) return "queries and keys differ in sequences";
    if (queries.extent(3) != keys.head_dim()) return "queries and keys differ in head_dim";
    if (keys.head_dim() < 1 || keys.head_dim() > max_count) {
      return "head_dim must be in [1, 2^31 - 1]";
    }
    const attention_params<memory>& a = info.attention;
    if (!(a.scale >= 0) || !(a.scale <= (std::numeric_limits<float>::max)())) {
      return "scale must be finite and >= 0";
    }
    if (!(a.soft_cap >= 0) || !(a.soft_cap <= (std::numeric_limits<float>::max)())) {
      return "soft_cap must be finite and >= 0";
    }
    if (a.sliding_window > max_count) return "sliding_window must be >= 0";
    if (a.alibi_slopes.data() != nullptr && a.alibi_slopes.extent(0) != q_heads()) {
      return "alibi_slopes must be [q_head]";
    }
    if (a.sink_logits.data() != nullptr && a.sink_logits.extent(0) != q_heads()) {
      return "sink_logits must be [q_head]";
    }
    return detail::invalid_window(*this);
  }
};

/// Attention that the engine already has, after the softmax.
template <class Row, class Memory = host_memory>
struct row_observation {
  using memory = Memory;

  /// [sequence, window, q_head, token]; the last row is that of the sequence's last token. Entries
  /// that a row does not see are not read: without info.rows those past its own token. A row may
  /// sum to less than 1.
  view<const Row, 4, Memory> rows;
  index_t kv_head_count;  ///< a divisor of q_heads
  lengths_view<Memory> lengths;
  layer_info<Memory> info;  ///< of its attention only sliding_window is used

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t sequences() const noexcept {
    return rows.extent(0);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t q_heads() const noexcept {
    return rows.extent(2);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t kv_heads() const noexcept {
    return kv_head_count;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t capacity() const noexcept {
    return rows.extent(3);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t window() const noexcept {
    return rows.extent(1);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    return length_of(lengths, sequence, capacity());
  }

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (rows.malformed()) return "rows need a pointer and extents >= 0";
    if (const char* why = invalid_lengths(lengths, sequences(), capacity())) return why;
    if (const char* why = detail::invalid_layer(*this)) return why;
    if (info.attention.sliding_window > max_count) return "sliding_window must be >= 0";
    return detail::invalid_window(*this);
  }
};

/// A cache alone, for policies that look at positions only.
template <key_source Keys>
struct cache_observation {
  using memory = typename Keys::memory;

  Keys keys;
  layer_info<memory> info;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t sequences() const noexcept {
    return keys.sequences();
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t q_heads() const noexcept {
    return keys.kv_heads();
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t kv_heads() const noexcept {
    return keys.kv_heads();
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t capacity() const noexcept {
    return keys.capacity();
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    return keys.tokens(sequence);
  }
  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (const char* why = keys.invalid()) return why;
    return detail::invalid_layer(*this);
  }
};

/// queries: [sequence, window, q_head, head_dim] of the last tokens.
template <class Query, key_source Keys>
[[nodiscard]] constexpr auto observe(view<Query, 4, typename Keys::memory> queries,
                                     const Keys& keys,
                                     layer_info<typename Keys::memory> info = {}) noexcept {
  detail::check_source<Keys>();
  return query_observation<std::remove_const_t<Query>, Keys>{queries, keys, info};
}

/// No attention.
template <key_source Keys>
[[nodiscard]] constexpr auto observe(const Keys& keys,
                                     layer_info<typename Keys::memory> info = {}) noexcept {
  detail::check_source<Keys>();
  return cache_observation<Keys>{keys, info};
}

/// rows: [sequence, window, q_head, token], softmax already applied; lengths: [sequence].
template <class Row, class Memory>
[[nodiscard]] constexpr auto observe_rows(view<Row, 4, Memory> rows, index_t kv_heads,
                                          lengths_view<Memory> lengths = {},
                                          layer_info<Memory> info = {}) noexcept {
  return row_observation<std::remove_const_t<Row>, Memory>{rows, kv_heads, lengths, info};
}

/// An observation and the scores that its tokens have earned so far, which are the caller's.
template <observation Seen>
struct scored_observation : Seen {
  using observed = Seen;

  /// [sequence, kv_head, capacity]
  scores_view<typename Seen::memory> scores;

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (const char* why = Seen::invalid()) return why;
    return detail::invalid_scores(scores, *this);
  }
};

template <observation Seen>
[[nodiscard]] constexpr auto with_scores(
    const Seen& seen, const scores_view<typename Seen::memory>& scores) noexcept {
  return scored_observation<Seen>{{seen}, scores};
}

/// The observation without what rides on it.
template <observation Seen>
[[nodiscard]] constexpr const auto& observed(const Seen& seen) noexcept {
  if constexpr (requires { typename Seen::observed; }) {
    return observed(static_cast<const typename Seen::observed&>(seen));
  } else {
    return seen;
  }
}

}  // namespace refreekv::inline v0
