// SPDX-License-Identifier: Apache-2.0
// The types of a policy's input: keys with the last queries, ready attention rows, or keys alone.
#pragma once

#include <cmath>
#include <limits>

#include "refreekv/attention/layer.hpp"

namespace refreekv::inline v0 {

/// Keys alone, for policies that read positions only.
template <key_source Keys>
struct key_layer {
  using memory = typename Keys::memory;

  Keys keys;
  layer_info<memory> info;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr cache_shape shape() const noexcept {
    return keys.shape();
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t sequences() const noexcept {
    return shape().sequences;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t q_heads() const noexcept {
    return shape().kv_heads;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t kv_heads() const noexcept {
    return shape().kv_heads;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t capacity() const noexcept {
    return shape().capacity;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    return keys.tokens(sequence);
  }
  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (const char* why = keys.invalid()) return why;
    return detail::invalid_layer(*this);
  }
};

/// Keys and the last queries. Attention is recomputed from them; no attention matrix is needed.
template <class Query, key_source Keys>
struct query_layer : key_layer<Keys> {
  using memory = typename Keys::memory;
  using key_layer<Keys>::keys;
  using key_layer<Keys>::info;

  /// [sequence, window, q_head, head_dim], rotated as the keys are. The last row is the query of
  /// the sequence's last token, whatever the sequence's length. `info.rows` says which rows exist.
  view<const Query, 4, memory> queries;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t q_heads() const noexcept {
    return queries.extent(2);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t head_dim() const noexcept {
    return this->shape().head_dim;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t window() const noexcept {
    return queries.extent(1);
  }

  /// The factor of q.k: the model's scale, or 1 / sqrt(head_dim).
  [[nodiscard]] REFREEKV_HOST_DEVICE float scale() const noexcept {
    return info.attention.scale > 0 ? info.attention.scale
                                    : 1.0f / std::sqrt(static_cast<float>(head_dim()));
  }

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (const char* why = keys.invalid()) return why;
    if (const char* why = detail::invalid_layer(*this)) return why;
    if (queries.malformed()) return "queries need a pointer and extents >= 0";
    if (queries.extent(0) != this->sequences()) return "queries and keys differ in sequences";
    if (queries.extent(3) != head_dim()) return "queries and keys differ in head_dim";
    if (head_dim() < 1 || head_dim() > max_count) {
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

/// Attention rows that the engine has already computed, after the softmax.
template <class Row, class Memory = host_memory>
struct row_layer {
  using memory = Memory;

  /// [sequence, window, q_head, token]; the last row is that of the sequence's last token. Entries
  /// of tokens that a row does not see are not read; without `info.rows` those are the tokens after
  /// the row's own. A row may sum to less than 1.
  view<const Row, 4, Memory> rows;
  index_t kv_head_count;  ///< a divisor of q_heads
  lengths_view<Memory> lengths;
  layer_info<Memory> info;  ///< of its `attention` only sliding_window is used

  /// Rows have no head_dim; it is 0.
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr cache_shape shape() const noexcept {
    return {rows.extent(0), kv_head_count, rows.extent(3), 0};
  }
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

/// Returns a layer of keys and the last tokens' queries [sequence, window, q_head, head_dim]. O(1).
template <class Query, key_source Keys>
[[nodiscard]] constexpr auto observe(view<Query, 4, typename Keys::memory> queries,
                                     const Keys& keys,
                                     layer_info<typename Keys::memory> info = {}) noexcept {
  detail::check_source<Keys>();
  return query_layer<std::remove_const_t<Query>, Keys>{{keys, info}, queries};
}

/// Returns a layer of keys without attention. O(1).
template <key_source Keys>
[[nodiscard]] constexpr auto observe(const Keys& keys,
                                     layer_info<typename Keys::memory> info = {}) noexcept {
  detail::check_source<Keys>();
  return key_layer<Keys>{keys, info};
}

/// Returns a layer of ready attention rows [sequence, window, q_head, token], after the softmax.
/// lengths: [sequence], in tokens. O(1).
template <class Row, class Memory>
[[nodiscard]] constexpr auto observe_rows(view<Row, 4, Memory> rows, index_t kv_heads,
                                          lengths_view<Memory> lengths = {},
                                          layer_info<Memory> info = {}) noexcept {
  return row_layer<std::remove_const_t<Row>, Memory>{rows, kv_heads, lengths, info};
}

}  // namespace refreekv::inline v0
