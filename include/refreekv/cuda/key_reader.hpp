// SPDX-License-Identifier: Apache-2.0
// How kernels find and read the keys of every kind of source.
#pragma once

#include "refreekv/cuda/element.hpp"
#include "refreekv/estimate.hpp"
#include "refreekv/scaled_keys.hpp"
#include "refreekv/shard.hpp"

namespace refreekv::inline v0::cuda_detail {

/// How a key of a source is found and read, in `staged` elements.
/// - `at(keys, sequence, kv_head, token)`: its address.
/// - `is_vector(address, dims)`: whether it can be copied as it is, 16 bytes at a time.
/// - `vector(address, dim)`: those from dim on.
/// - `gather(address, dim, dims, to)`: the same, element by element, with zeros past the end.
/// - `product(address, x)`: q.k, given the sum x of products with staged elements.
template <class Keys>
struct key_reader {
  using element_type = std::remove_const_t<typename Keys::element_type>;
  using staged = stored<element_type>;
  struct address {
    const element_type* data;
    index_t dim_stride;
  };

  [[nodiscard]] static REFREEKV_DEVICE address at(const Keys& keys, index_t sequence,
                                                  index_t kv_head, index_t token) noexcept {
    const auto run = keys.run_at(sequence, kv_head, token);
    return {run.data, run.dim_stride};
  }
  [[nodiscard]] static REFREEKV_DEVICE bool is_vector(const address& key, index_t dims) noexcept {
    return key.dim_stride == 1 && dims % fragment_elements<staged> == 0 &&
           reinterpret_cast<std::uintptr_t>(key.data) % sizeof(vector16) == 0;
  }
  [[nodiscard]] static REFREEKV_DEVICE const void* vector(const address& key,
                                                          index_t dim) noexcept {
    return key.data + dim;
  }
  static REFREEKV_DEVICE void gather(const address& key, index_t dim, index_t dims,
                                     vector16& to) noexcept {
    to = {};
    REFREEKV_NO_UNROLL
    for (int i = 0; i < fragment_elements<staged> && dim + i < dims; ++i) {
      std::memcpy(reinterpret_cast<char*>(&to) + i * int{sizeof(staged)},
                  key.data + (dim + i) * key.dim_stride, sizeof(staged));
    }
  }
  [[nodiscard]] static REFREEKV_DEVICE float product(const address&, float x) noexcept { return x; }
};

template <class Rows, class Scales>
struct key_reader<scaled_keys<Rows, Scales>> {
  using rows = key_reader<Rows>;
  using staged = typename rows::staged;
  struct address {
    typename rows::address row;
    float scale;
  };

  [[nodiscard]] static REFREEKV_DEVICE address at(const scaled_keys<Rows, Scales>& keys,
                                                  index_t sequence, index_t kv_head,
                                                  index_t token) noexcept {
    return {rows::at(keys.rows, sequence, kv_head, token),
            *keys.scales.run_at(sequence, kv_head, token).data};
  }
  [[nodiscard]] static REFREEKV_DEVICE bool is_vector(const address& key, index_t dims) noexcept {
    return rows::is_vector(key.row, dims);
  }
  [[nodiscard]] static REFREEKV_DEVICE const void* vector(const address& key,
                                                          index_t dim) noexcept {
    return rows::vector(key.row, dim);
  }
  static REFREEKV_DEVICE void gather(const address& key, index_t dim, index_t dims,
                                     vector16& to) noexcept {
    rows::gather(key.row, dim, dims, to);
  }
  [[nodiscard]] static REFREEKV_DEVICE float product(const address& key, float x) noexcept {
    return x * key.scale;
  }
};

template <class Source>
struct key_reader<shard<Source>> : key_reader<Source> {
  [[nodiscard]] static REFREEKV_DEVICE auto at(const shard<Source>& keys, index_t sequence,
                                               index_t kv_head, index_t token) noexcept {
    return key_reader<Source>::at(keys.source(), sequence, kv_head,
                                  keys.own_before(sequence, token));
  }
};

template <class Memory>
struct key_reader<int4_keys<Memory>> {
  using staged = float;
  struct address {
    const std::uint8_t* codes;
    float low, step;
    const float* centre;  ///< or null
  };

  [[nodiscard]] static REFREEKV_DEVICE address at(const int4_keys<Memory>& keys, index_t sequence,
                                                  index_t kv_head, index_t token) noexcept {
    return {keys.codes.at(sequence, kv_head, token), keys.ranges(sequence, kv_head, token, 0),
            keys.ranges(sequence, kv_head, token, 1), keys.centres.at(sequence, kv_head)};
  }
  [[nodiscard]] static REFREEKV_DEVICE bool is_vector(const address&, index_t) noexcept {
    return false;
  }
  [[nodiscard]] static REFREEKV_DEVICE const void* vector(const address&, index_t) noexcept {
    return nullptr;
  }
  static REFREEKV_DEVICE void gather(const address& key, index_t dim, index_t dims,
                                     vector16& to) noexcept {
    to = {};
    for (int i = 0; i < fragment_elements<float> && dim + i < dims; ++i) {
      const unsigned codes = key.codes[(dim + i) / 2];
      const unsigned code = (dim + i) % 2 == 0 ? codes & 15u : codes >> 4;
      const float x = static_cast<float>(code) * key.step + key.low;
      to.words[i] = as_bits(key.centre == nullptr ? x : x + key.centre[dim + i]);
    }
  }
  [[nodiscard]] static REFREEKV_DEVICE float product(const address&, float x) noexcept { return x; }
};

}  // namespace refreekv::inline v0::cuda_detail
