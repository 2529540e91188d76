// SPDX-License-Identifier: Apache-2.0
// Logits of a query window against one chunk of keys, for any key type and layout.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "refreekv/attention/observe.hpp"
#include "refreekv/backend/logit.hpp"
#include "refreekv/core/chunks.hpp"
#include "refreekv/cpu/simd/dot_bf16.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Tokens of one KV head that are processed together: at most chunk_tokens.
struct key_block {
  index_t sequence;
  index_t kv_head;
  token_range tokens;
};

/// Distance between rows of a tile, in floats. Not a power of two: rows would then compete for the
/// same cache sets, with each other and with keys.
inline constexpr index_t tile_stride = chunk_tokens + 16;

/// Prefetch distances, in bytes of keys alone; at most fetched_tokens tokens. The hardware
/// prefetcher sees several short streams and guesses too late.
inline constexpr index_t fetched_soon = 4 << 10, fetched_later = 16 << 10, fetched_tokens = 128;

template <class Keys>
using key_of = std::remove_const_t<typename Keys::element_type>;

/// Addresses of a chunk's keys, and of the keys that come after them. The multiplication depends on
/// these, not on the layout, so it is compiled once per element type.
template <class Key>
class block_addresses {
 public:
  template <row_source Keys>
  block_addresses(const Keys& keys, const key_block& block, const key_block& next) noexcept
      : count_(locate(keys, block, chunk_tokens, at_, dim_stride_)) {
    if (count_ == 0) return;
    const index_t key_bytes = keys.shape().head_dim * static_cast<index_t>(sizeof(Key));
    soon_ = (std::min)(fetched_soon / key_bytes, fetched_tokens);
    later_ = (std::min)(fetched_later / key_bytes, fetched_tokens);
    const index_t tiles = (count_ + tile_tokens - 1) / tile_tokens * tile_tokens;
    std::fill(at_ + count_, at_ + tiles, at_[count_ - 1]);
    index_t unused;
    const index_t last = tiles + locate(keys, next, later_, at_ + tiles, unused) - 1;
    std::fill(at_ + last + 1, at_ + tiles + later_, at_[last]);
  }

  /// Addresses of single tokens [count]. Requires count > 0.
  template <row_source Keys>
  block_addresses(const Keys& keys, index_t sequence, index_t kv_head, const position_t* tokens,
                  index_t count) noexcept
      : count_(count) {
    for (index_t i = 0; i < count; ++i) {
      const auto run = keys.run_at(sequence, kv_head, tokens[i]);
      at_[i] = run.data;
      dim_stride_ = run.dim_stride;
    }
    const index_t tiles = (count + tile_tokens - 1) / tile_tokens * tile_tokens;
    std::fill(at_ + count, at_ + tiles, at_[count - 1]);
  }

  [[nodiscard]] index_t count() const noexcept { return count_; }
  [[nodiscard]] index_t dim_stride() const noexcept { return dim_stride_; }
  /// Returns the addresses from token t on.
  [[nodiscard]] key_addresses<Key> from(index_t t) const noexcept {
    return {at_ + t, at_ + t + soon_, at_ + t + later_};
  }

 private:
  /// Writes the addresses of the first `most` tokens of a chunk, and returns how many there are.
  template <class Keys>
  static index_t locate(const Keys& keys, const key_block& block, index_t most, const Key** at,
                        index_t& dim_stride) noexcept {
    const index_t count = (std::min)(most, block.tokens.end - block.tokens.begin);
    for (index_t done = 0; done < count;) {
      const auto run = keys.run_at(block.sequence, block.kv_head, block.tokens.begin + done);
      const index_t tokens = (std::min)(run.tokens, count - done);
      for (index_t t = 0; t < tokens; ++t) at[done + t] = run.data + t * run.token_stride;
      dim_stride = run.dim_stride;
      done += tokens;
    }
    return count;
  }

  alignas(64) const Key* at_[static_cast<std::size_t>(chunk_tokens + tile_tokens + fetched_tokens)];
  index_t dim_stride_ = 1, soon_ = 0, later_ = 0;
  index_t count_;
};
template <class Keys>
block_addresses(const Keys&, const key_block&, const key_block&) -> block_addresses<key_of<Keys>>;
template <class Keys>
block_addresses(const Keys&, index_t, index_t, const position_t*,
                index_t) -> block_addresses<key_of<Keys>>;

/// How the queries and keys of a layer are multiplied.
template <class Layer>
struct product_of_observation;
template <class Query, class Keys>
struct product_of_observation<query_layer<Query, Keys>> {
  static_assert(
      row_source<Keys>,
      "on the CPU keys are rows of float, half or bfloat16: 8-bit scaled_keys are read by "
      "the CUDA backend alone, and 4-bit keys serve policies that score tokens");
  static_assert(element<key_of<Keys>>,
                "keys are float, half or bfloat16 (Eigen's types, f16_bits or bf16_bits)");
  using type = product<Query, key_of<Keys>>;
};
template <class Layer>
using product_of = typename product_of_observation<Layer>::type;

/// The packed queries of one KV head, and their attention parameters.
template <class Product>
struct head_queries {
  const typename Product::packed* packed;  ///< [q_head of the KV head, window, packed_dim]
  index_t first_head, heads;               ///< first q_head of the KV head; q_heads per KV head
  index_t head_dim;
  float scale;
  const attention_params<>& attention;
};

template <class Query, class Keys>
[[nodiscard]] auto queries_of(
    const query_layer<Query, Keys>& layer, index_t kv_head,
    const typename product_of<query_layer<Query, Keys>>::packed* packed) noexcept {
  const index_t heads = layer.q_heads() / layer.kv_heads();
  return head_queries<product_of<query_layer<Query, Keys>>>{
      packed, kv_head * heads, heads, layer.head_dim(), layer.scale(), layer.info.attention};
}

/// Writes values [row, stride] = scale * queries [row, packed_dim] . keys [token, head_dim]. Uses
/// gathered [tile_tokens, head_dim] if dimensions are not contiguous and head_dim is large. Writes
/// up to three results past the last token. O(rows * tokens * head_dim).
template <class Product, class Key>
void store_logits(const block_addresses<Key>& keys, const typename Product::packed* queries,
                  index_t rows, index_t head_dim, float scale, Key* gathered, float* values,
                  index_t stride = tile_stride) noexcept {
  const auto multiply = [&](key_addresses<Key> at, index_t start, index_t count) {
    for_each_tile<Product>(queries, rows, head_dim, [&](auto n, index_t row, const auto* tile) {
      dot_rows<Product, n()>(tile, at, count, head_dim, [&](index_t i, index_t t, const lanes& x) {
        float results[lane_count];
        store(x * scale, results);
        const index_t first = i * rows_a_register;
        for (index_t r = first; r < (std::min)(first + rows_a_register, n()); ++r) {
          std::memcpy(values + (row + r) * stride + start + t, results + (r - first) * tile_tokens,
                      sizeof(float[4]));
        }
      });
      at.soon = at.later = at.now;  // the first tile fetches the keys for all tiles
    });
  };
  if (keys.dim_stride() == 1) {
    multiply(keys.from(0), 0, keys.count());
    return;
  }
  // In a token-contiguous layout, neighbours in memory are the same dimension of other tokens.
  // Tokens that share a cache line are gathered together, as many as there is room for.
  constexpr index_t line = 64 / sizeof(Key), room = line * 256;
  Key nearby[std::size_t{room}];
  const bool fits = tile_tokens * head_dim <= room;
  Key* copy = fits ? nearby : gathered;
  const index_t together =
      fits ? (std::min)(line, room / head_dim / tile_tokens * tile_tokens) : tile_tokens;
  const Key* copies[std::size_t{line}];
  for (index_t i = 0; i < together; ++i) copies[i] = copy + i * head_dim;
  for (index_t t = 0; t < keys.count(); t += together) {
    const index_t tiles = (keys.count() - t + tile_tokens - 1) / tile_tokens;
    const index_t count = (std::min)(together, tiles * tile_tokens);
    const Key* const* from = keys.from(t).now;
    for (index_t d = 0; d < head_dim; ++d) {
      constexpr index_t soon = 16;  // dimensions
      if (d + soon < head_dim) prefetch(from[0] + (d + soon) * keys.dim_stride());
      for (index_t i = 0; i < count; ++i) copy[i * head_dim + d] = from[i][d * keys.dim_stride()];
    }
    multiply({copies, copies, copies}, t, count);
  }
}

/// Packs the last `window` queries of one query head into packed [q_head of the KV head, window,
/// packed_dim].
template <class Query, class Keys>
void pack_queries(const query_layer<Query, Keys>& layer, index_t sequence, index_t q_head,
                  index_t window,
                  typename product_of<query_layer<Query, Keys>>::packed* packed) noexcept {
  const index_t heads = layer.q_heads() / layer.kv_heads();
  for (index_t r = 0; r < window; ++r) {
    pack<product_of<query_layer<Query, Keys>>>(
        layer.queries.at(sequence, layer.window() - window + r, q_head), layer.queries.stride(3),
        layer.head_dim(), q_head % heads * window + r, heads * window, packed);
  }
}

/// Replaces each x of logits [count] by cap * tanh(x / cap). Requires count <= chunk_tokens.
inline void cap_softly(float* logits, index_t count, double cap) noexcept {
  const auto size = static_cast<Eigen::Index>(count);
  double e[static_cast<std::size_t>(chunk_tokens)];
  Eigen::Map<Eigen::ArrayXd>(e, size) =
      (Eigen::Map<const Eigen::ArrayXf>(logits, size).cast<double>() * (2 / cap)).exp();
  for (index_t t = 0; t < count; ++t)
    logits[t] = detail::soft_capped(logits[t], cap, 1 / cap, e[t]);
}

/// Turns the scaled q.k of one row into logits: adds soft cap and ALiBi, and writes -inf for tokens
/// that the row does not see.
inline void finish_logits(const attention_params<>& params, const query_window& window,
                          index_t q_head, index_t row, token_range range, float* logits) noexcept {
  const index_t count = range.end - range.begin;
  if (params.soft_cap > 0) cap_softly(logits, count, static_cast<double>(params.soft_cap));
  const token_range visible = window.visible(row);
  if (params.alibi_slopes.data() != nullptr) {
    const auto slope = static_cast<double>(params.alibi_slopes(q_head));
    const index_t position = window.position + row;
    for (index_t t = range.begin; t < range.end; ++t) {
      float& logit = logits[t - range.begin];
      logit = detail::with_alibi(logit, slope, t - position);
    }
  }
  const float hidden = -std::numeric_limits<float>::infinity();
  const index_t first = std::clamp(visible.begin, range.begin, range.end) - range.begin;
  const index_t last = std::clamp(visible.end, range.begin, range.end) - range.begin;
  std::fill(logits, logits + first, hidden);
  std::fill(logits + last, logits + count, hidden);
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
