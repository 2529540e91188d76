// SPDX-License-Identifier: Apache-2.0
// How chunks of keys are read on the CPU, for every kind of source: rows of floats in place, all
// others unpacked to floats.
#pragma once

#include <algorithm>

#include "refreekv/cache/block_keys.hpp"
#include "refreekv/cache/int4_keys.hpp"
#include "refreekv/cache/scaled_keys.hpp"
#include "refreekv/cache/shard.hpp"
#include "refreekv/cpu/simd/dot_bf16.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Tokens of one KV head that are processed together: at most chunk_tokens.
struct chunk_place {
  index_t sequence;
  index_t kv_head;
  token_range tokens;
};

template <class Keys>
using key_of = std::remove_const_t<typename Keys::element_type>;

/// Prefetch distances, in bytes of keys alone; at most prefetched_tokens tokens. The hardware
/// prefetcher sees several short streams and guesses too late.
inline constexpr index_t prefetched_near = 4 << 10, prefetched_far = 16 << 10,
                         prefetched_tokens = 128;

/// Addresses of a chunk's keys, and of the keys that come after them. The multiplication depends on
/// these, not on the layout, so it is compiled once per element type.
template <class Key>
class chunk_addresses {
 public:
  template <row_source Keys>
  chunk_addresses(const Keys& keys, const chunk_place& block, const chunk_place& next) noexcept
      : count_(locate(keys, block, chunk_tokens, at_, dim_stride_)) {
    if (count_ == 0) return;
    const index_t key_bytes = keys.shape().head_dim * static_cast<index_t>(sizeof(Key));
    near_tokens_ = (std::min)(prefetched_near / key_bytes, prefetched_tokens);
    far_tokens_ = (std::min)(prefetched_far / key_bytes, prefetched_tokens);
    const index_t tiles = (count_ + tile_tokens - 1) / tile_tokens * tile_tokens;
    std::fill(at_ + count_, at_ + tiles, at_[count_ - 1]);
    index_t unused;
    const index_t last = tiles + locate(keys, next, far_tokens_, at_ + tiles, unused) - 1;
    std::fill(at_ + last + 1, at_ + tiles + far_tokens_, at_[last]);
  }

  /// Addresses of single tokens [count]. Requires count > 0.
  template <row_source Keys>
  chunk_addresses(const Keys& keys, index_t sequence, index_t kv_head, const position_t* tokens,
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
    return {at_ + t, at_ + t + near_tokens_, at_ + t + far_tokens_};
  }

 private:
  /// Writes the addresses of the first `most` tokens of a chunk, and returns how many there are.
  template <class Keys>
  static index_t locate(const Keys& keys, const chunk_place& block, index_t most, const Key** at,
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

  alignas(
      64) const Key* at_[static_cast<std::size_t>(chunk_tokens + tile_tokens + prefetched_tokens)];
  index_t dim_stride_ = 1, near_tokens_ = 0, far_tokens_ = 0;
  index_t count_;
};
template <class Keys>
chunk_addresses(const Keys&, const chunk_place&,
                const chunk_place&) -> chunk_addresses<key_of<Keys>>;
template <class Keys>
chunk_addresses(const Keys&, index_t, index_t, const position_t*,
                index_t) -> chunk_addresses<key_of<Keys>>;

/// Calls f(token, row, dim_stride) for the `tokens` of one KV head of a row source.
template <row_source Source, class F>
void for_each_row_at(const Source& source, index_t sequence, index_t kv_head, token_range tokens,
                     const F& f) noexcept {
  for (index_t t = tokens.begin; t < tokens.end;) {
    const auto run = source.run_at(sequence, kv_head, t);
    for (index_t i = 0; i < run.tokens && t < tokens.end; ++i, ++t) {
      f(t, run.data + i * run.token_stride, run.dim_stride);
    }
  }
}

/// A source of the tokens [begin, end) of one KV head, unpacked to floats.
struct unpacked_keys {
  using element_type = const float;
  using memory = host_memory;

  const float* rows;  ///< [token - begin, head_dim]
  index_t begin, end, dims;

  [[nodiscard]] constexpr cache_shape shape() const noexcept { return {1, 1, end, dims}; }
  [[nodiscard]] constexpr index_t tokens(index_t) const noexcept { return end; }
  [[nodiscard]] constexpr const char* invalid() const noexcept { return nullptr; }
  [[nodiscard]] constexpr token_run<const float> run_at(index_t, index_t,
                                                        index_t token) const noexcept {
    return {rows + (token - begin) * dims, end - token, dims, 1};
  }
};

/// Writes the keys of `tokens` as floats to rows [token, head_dim]. O(tokens * head_dim).
inline void unpack(const int4_keys<>& keys, index_t sequence, index_t kv_head, token_range tokens,
                   float* rows) noexcept {
  const float* centre = keys.centres.at(sequence, kv_head);
  for (index_t t = tokens.begin; t < tokens.end; ++t, rows += keys.dims) {
    const std::uint8_t* codes = keys.codes.at(sequence, kv_head, t);
    const float low = keys.ranges(sequence, kv_head, t, 0);
    const float step = keys.ranges(sequence, kv_head, t, 1);
    const auto value = [&](int code) {
      return detail::int4_value(static_cast<float>(code), low, step);
    };
    for (index_t i = 0; i < keys.dims / 2; ++i) {
      rows[2 * i] = value(codes[i] & 15);
      rows[2 * i + 1] = value(codes[i] >> 4);
    }
    if (keys.dims % 2 != 0) rows[keys.dims - 1] = value(codes[keys.dims / 2] & 15);
    for (index_t d = 0; centre != nullptr && d < keys.dims; ++d) rows[d] += centre[d];
  }
}
template <class Rows, class Scales>
  requires small_element<key_of<Rows>>
void unpack(const scaled_keys<Rows, Scales>& keys, index_t sequence, index_t kv_head,
            token_range tokens, float* rows) noexcept {
  const index_t dims = keys.shape().head_dim;
  for_each_row_at(keys.rows, sequence, kv_head, tokens,
                  [&](index_t t, const auto* key, index_t stride) {
                    const float scale = *keys.scales.run_at(sequence, kv_head, t).data;
                    for (index_t d = 0; d < dims; ++d) rows[d] = widen(key[d * stride]) * scale;
                    rows += dims;
                  });
}
/// Writes a block as floats, in a loop that compilers vectorise.
inline void unpack(const q8_0_block& block, float* row) noexcept {
  const float scale = detail::half_value(block.scale.bits);
  for (int d = 0; d < 32; ++d) row[d] = static_cast<float>(detail::block_code(block, d)) * scale;
}
inline void unpack(const q4_0_block& block, float* row) noexcept {
  const float scale = detail::half_value(block.scale.bits);
  for (int d = 0; d < 16; ++d) {
    const int low = detail::block_code(block, d), high = detail::block_code(block, d + 16);
    row[d] = static_cast<float>(low) * scale;
    row[d + 16] = static_cast<float>(high) * scale;
  }
}
template <class Rows>
void unpack(const block_keys<Rows>& keys, index_t sequence, index_t kv_head, token_range tokens,
            float* rows) noexcept {
  const index_t blocks = keys.rows.shape().head_dim;
  for_each_row_at(keys.rows, sequence, kv_head, tokens,
                  [&](index_t, const auto* key, index_t stride) {
                    for (index_t b = 0; b < blocks; ++b, rows += block_dims) {
                      unpack(key[b * stride], rows);
                    }
                  });
}
template <class Source>
  requires requires(const Source& source, float* rows) {
    unpack(source, index_t{}, index_t{}, token_range{}, rows);
  }
void unpack(const shard<Source>& keys, index_t sequence, index_t kv_head, token_range tokens,
            float* rows) noexcept {
  const index_t first = keys.local_before(sequence, tokens.begin);
  unpack(keys.source(), sequence, kv_head, {first, first + tokens.end - tokens.begin}, rows);
}

/// Keys that products read in place.
template <class Keys>
concept key_in_place = row_source<Keys> && element<key_of<Keys>>;
/// Keys that are unpacked first, a chunk at a time.
template <class Keys>
concept packed_keys = !key_in_place<Keys> && requires(const Keys& keys, float* rows) {
  unpack(keys, index_t{}, index_t{}, token_range{}, rows);
};

template <class Keys>
struct multiplied_key_of {
  using type = float;
};
template <key_in_place Keys>
struct multiplied_key_of<Keys> {
  using type = key_of<Keys>;
};
/// The type of the keys that are multiplied.
template <class Keys>
using multiplied_key = typename multiplied_key_of<Keys>::type;

/// Returns the addresses of a chunk's keys, and of keys of the next chunk to prefetch. Packed keys
/// are unpacked to unpacked [chunk_tokens, head_dim], and nothing is prefetched.
template <class Keys>
[[nodiscard]] chunk_addresses<multiplied_key<Keys>> read_keys(
    const Keys& keys, const chunk_place& block, const chunk_place& next,
    [[maybe_unused]] float* unpacked) noexcept {
  if constexpr (packed_keys<Keys>) {
    unpack(keys, block.sequence, block.kv_head, block.tokens, unpacked);
    const auto [begin, end] = block.tokens;
    const chunk_place nothing{block.sequence, block.kv_head, {begin, begin}};
    return {unpacked_keys{unpacked, begin, end, keys.shape().head_dim}, block, nothing};
  } else {
    return {keys, block, next};
  }
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
