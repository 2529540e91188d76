// SPDX-License-Identifier: Apache-2.0
// How kernels find and read keys, for every kind of source.
#pragma once

#include "refreekv/cache/block_keys.hpp"
#include "refreekv/cache/int4_keys.hpp"
#include "refreekv/cache/scaled_keys.hpp"
#include "refreekv/cache/shard.hpp"
#include "refreekv/cuda/block/element.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Returns the largest power of two, up to 16, that divides both an address and a number of bytes.
[[nodiscard]] REFREEKV_DEVICE int common_alignment(const void* address, unsigned bytes) noexcept {
  const auto bits = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(address)) | bytes | 16u;
  return static_cast<int>(bits & (0u - bits));
}

/// Locates the keys of a source, brings them to shared memory and unpacks them.
/// - `at(keys, sequence, kv_head, token)`: returns the address of a key.
/// - `slot`: the part of a key that one lane reads at a time, `width` elements.
/// - `alignment(address, dims)`: returns the alignment of the key in bytes; 1 if its elements are
///   not contiguous.
/// - `bytes(dims)`: returns the size of `dims` elements. `data(address, dim)`: returns where the
///   bytes of dimension `dim` begin.
/// - `gather(address, dim, dims, to)`: fills a slot element by element, with zeros past the last
///   dimension. It reads word by word, because registers do not suffice for more loads at once.
/// - `unpack(slot, address, to)`: writes the slot's elements as floats, without the part that all
///   keys of a head have in common.
/// - `has_common`: whether there is such a common part. `common(address, dim, dims, query)`:
///   returns its product with a part of a query.
/// - `product(address, x)`: returns q.k. x: the sum of products of the query with unpacked
///   elements.
template <class Keys>
struct key_reader {
  using element_type = std::remove_const_t<typename Keys::element_type>;
  using staged = stored<element_type>;
  using slot = vector16;
  static constexpr int width = fragment_elements<staged>;
  static constexpr bool has_common = false;
  struct address {
    const element_type* data;
    index_t dim_stride;
  };

  [[nodiscard]] static REFREEKV_DEVICE address at(const Keys& keys, index_t sequence,
                                                  index_t kv_head, index_t token) noexcept {
    const auto run = keys.run_at(sequence, kv_head, token);
    return {run.data, run.dim_stride};
  }
  [[nodiscard]] static REFREEKV_DEVICE int alignment(const address& key, unsigned dims) noexcept {
    return key.dim_stride == 1 ? common_alignment(key.data, bytes(dims)) : 1;
  }
  [[nodiscard]] static REFREEKV_DEVICE unsigned bytes(unsigned dims) noexcept {
    return dims * unsigned{sizeof(staged)};
  }
  [[nodiscard]] static REFREEKV_DEVICE const char* data(const address& key, unsigned dim) noexcept {
    return reinterpret_cast<const char*>(key.data + dim);
  }
  static REFREEKV_DEVICE void gather(const address& key, unsigned dim, unsigned dims,
                                     slot& to) noexcept {
    const element_type* from = key.data + dim * key.dim_stride;
    REFREEKV_NO_UNROLL
    for (std::uint32_t& word : to.words) {
      std::uint32_t bits = 0;
      REFREEKV_UNROLL
      for (unsigned byte = 0; byte < sizeof bits; byte += sizeof(staged)) {
        if (dim++ < dims) {
          std::memcpy(reinterpret_cast<char*>(&bits) + byte,
                      __builtin_assume_aligned(from, alignof(element_type)), sizeof(staged));
        }
        from += key.dim_stride;
      }
      word = bits;
    }
  }
  static REFREEKV_DEVICE void unpack(const slot& from, const address&,
                                     float (&to)[std::size_t{width}]) noexcept {
    cuda_detail::unpack<staged>(from, to);
  }
  [[nodiscard]] static REFREEKV_DEVICE float product(const address&, float x) noexcept { return x; }
};

template <class Rows, class Scales>
struct key_reader<scaled_keys<Rows, Scales>> : key_reader<Rows> {
  using rows = key_reader<Rows>;
  struct address : rows::address {
    float scale;
  };

  [[nodiscard]] static REFREEKV_DEVICE address at(const scaled_keys<Rows, Scales>& keys,
                                                  index_t sequence, index_t kv_head,
                                                  index_t token) noexcept {
    return {rows::at(keys.rows, sequence, kv_head, token),
            *keys.scales.run_at(sequence, kv_head, token).data};
  }
  [[nodiscard]] static REFREEKV_DEVICE float product(const address& key, float x) noexcept {
    return x * key.scale;
  }
};

template <class Source>
struct key_reader<shard<Source>> : key_reader<Source> {
  using address = typename key_reader<Source>::address;

  [[nodiscard]] static REFREEKV_DEVICE address at(const shard<Source>& keys, index_t sequence,
                                                  index_t kv_head, index_t token) noexcept {
    return key_reader<Source>::at(keys.source(), sequence, kv_head,
                                  keys.local_before(sequence, token));
  }
};

/// Keys in blocks. A lane reads 8 codes, a quarter of a block, and the block's scale. Blocks are
/// gathered byte by byte: neither q8_0's 34 bytes nor q4_0's 18 are whole words. So `bytes` and
/// `data`, which only copies need, are not meaningful.
template <class Rows>
struct key_reader<block_keys<Rows>> {
  using block = std::remove_const_t<typename Rows::element_type>;
  struct alignas(16) slot {
    std::uint32_t words[2];  ///< codes + 128, in bytes
    float scale;
  };
  static constexpr int width = 8;
  static constexpr bool has_common = false;
  struct address {
    const block* data;
    index_t block_stride;
  };

  [[nodiscard]] static REFREEKV_DEVICE address at(const block_keys<Rows>& keys, index_t sequence,
                                                  index_t kv_head, index_t token) noexcept {
    const auto run = keys.rows.run_at(sequence, kv_head, token);
    return {run.data, run.dim_stride};
  }
  [[nodiscard]] static REFREEKV_DEVICE int alignment(const address&, unsigned) noexcept {
    return 1;
  }
  [[nodiscard]] static REFREEKV_DEVICE unsigned bytes(unsigned dims) noexcept { return dims; }
  [[nodiscard]] static REFREEKV_DEVICE const char* data(const address& key, unsigned dim) noexcept {
    return reinterpret_cast<const char*>(&block_of(key, dim));
  }
  static REFREEKV_DEVICE void gather(const address& key, unsigned dim, unsigned,
                                     slot& to) noexcept {
    const block& from = block_of(key, dim);
    const int first = static_cast<int>(dim % static_cast<unsigned>(block_dims));
    REFREEKV_NO_UNROLL
    for (int i = 0; i < 2; ++i) {
      std::uint32_t bits = 0;
      REFREEKV_NO_UNROLL
      for (int k = 0; k < 4; ++k) {
        bits |= static_cast<std::uint32_t>(detail::block_code(from, first + 4 * i + k) + 128)
                << 8 * k;
      }
      to.words[i] = bits;
    }
    to.scale = widen_half(from.scale.bits);
  }
  static REFREEKV_DEVICE void unpack(const slot& from, const address&,
                                     float (&to)[std::size_t{width}]) noexcept {
    REFREEKV_UNROLL
    for (int i = 0; i < width; ++i) {
      to[i] = small_float(from.words[i / 4] >> 8 * (i % 4) & 0xffu, 128) * from.scale;
    }
  }
  [[nodiscard]] static REFREEKV_DEVICE float product(const address&, float x) noexcept { return x; }

 private:
  [[nodiscard]] static REFREEKV_DEVICE const block& block_of(const address& key,
                                                             unsigned dim) noexcept {
    return key.data[dim / static_cast<unsigned>(block_dims) * key.block_stride];
  }
};

/// Keys in 4 bits. A lane reads 16 codes, so a key of 128 dimensions is shared by 8 lanes.
template <class Memory>
struct key_reader<int4_keys<Memory>> {
  struct alignas(8) slot {
    std::uint32_t words[2];
  };
  static constexpr int width = 16;
  static constexpr bool has_common = true;
  struct address {
    const std::uint8_t* codes;
    float low, step;
    const float* centre;  ///< the head's centre [head_dim], or null
  };

  [[nodiscard]] static REFREEKV_DEVICE address at(const int4_keys<Memory>& keys, index_t sequence,
                                                  index_t kv_head, index_t token) noexcept {
    return {keys.codes.at(sequence, kv_head, token), keys.ranges(sequence, kv_head, token, 0),
            keys.ranges(sequence, kv_head, token, 1), keys.centres.at(sequence, kv_head)};
  }
  [[nodiscard]] static REFREEKV_DEVICE int alignment(const address& key, unsigned dims) noexcept {
    return common_alignment(key.codes, bytes(dims));
  }
  [[nodiscard]] static REFREEKV_DEVICE unsigned bytes(unsigned dims) noexcept {
    return (dims + 1) / 2;
  }
  [[nodiscard]] static REFREEKV_DEVICE const char* data(const address& key, unsigned dim) noexcept {
    return reinterpret_cast<const char*>(key.codes + dim / 2);
  }
  static REFREEKV_DEVICE void gather(const address& key, unsigned dim, unsigned dims,
                                     slot& to) noexcept {
    const std::uint8_t* from = key.codes + dim / 2;
    int left = static_cast<int>(bytes(dims) - dim / 2);
    REFREEKV_NO_UNROLL
    for (std::uint32_t& word : to.words) {
      std::uint32_t bits = 0;
      REFREEKV_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (i < left) bits |= std::uint32_t{from[i]} << 8 * i;
      }
      word = bits;
      from += 4;
      left -= 4;
    }
  }
  static REFREEKV_DEVICE void unpack(const slot& from, const address& key,
                                     float (&to)[std::size_t{width}]) noexcept {
    REFREEKV_UNROLL
    for (int i = 0; i < width; ++i) {
      to[i] = detail::int4_value(small_float(from.words[i / 8] >> 4 * (i % 8) & 15u, 0), key.low,
                                 key.step);
    }
  }
  [[nodiscard]] static REFREEKV_DEVICE float common(
      const address& key, unsigned dim, unsigned dims,
      const float (&query)[std::size_t{width}]) noexcept {
    float product = 0;
    if (key.centre == nullptr) return product;
    const float* centre = key.centre + dim;
    const int left = static_cast<int>(dims - dim);
    REFREEKV_UNROLL
    for (int i = 0; i < width; ++i) {
      if (i < left) product += query[i] * centre[i];
    }
    return product;
  }
  [[nodiscard]] static REFREEKV_DEVICE float product(const address&, float x) noexcept { return x; }
};

}  // namespace refreekv::inline v0::cuda_detail
