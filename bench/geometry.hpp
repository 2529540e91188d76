// SPDX-License-Identifier: Apache-2.0
// The layers that are measured, by the name of the model they belong to.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "refreekv/refreekv.hpp"

namespace bench {

using refreekv::index_t;

struct geometry {
  const char* name;
  index_t q_heads, kv_heads, head_dim;
};

inline constexpr std::array<geometry, 5> geometries{{{"llama3_8b", 32, 8, 128},
                                                     {"llama3_70b", 64, 8, 128},
                                                     {"mistral_7b", 32, 8, 128},
                                                     {"qwen2_5_7b", 28, 4, 128},
                                                     {"smollm2", 9, 3, 64}}};

/// One layer of one sequence, keys and values [1, kv_head, token, head_dim] and the last query
/// [1, 1, q_head, head_dim], filled with noise: attention is spread out, so about 2 % are dropped
/// and what is measured is the decision.
template <class T>
class layer {
 public:
  layer(const geometry& g, index_t tokens)
      : geometry_(g),
        tokens_(tokens),
        keys_(size(g.kv_heads * tokens * g.head_dim)),
        values_(keys_.size()),
        query_(size(g.q_heads * g.head_dim)) {
    for (T& x : keys_) x = T(1.7f * noise());
    for (T& x : query_) x = T(noise());
  }

  auto keys() { return source(keys_); }
  auto values() { return source(values_); }
  auto seen() {
    return refreekv::observe(
        refreekv::view(query_.data(), {1, 1, geometry_.q_heads, geometry_.head_dim}), keys(),
        {.layer = 2});
  }
  const std::byte* key_bytes() const { return reinterpret_cast<const std::byte*>(keys_.data()); }
  std::size_t bytes() const { return keys_.size() * sizeof(T); }

 private:
  static std::size_t size(index_t n) { return static_cast<std::size_t>(n); }
  refreekv::dense<T> source(std::vector<T>& rows) {
    return refreekv::dense(
        refreekv::view(rows.data(), {1, geometry_.kv_heads, tokens_, geometry_.head_dim}));
  }
  /// xorshift, in [-1, 1): millions of numbers, quickly and the same everywhere.
  float noise() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<float>(static_cast<std::int32_t>(state_ >> 32)) * 0x1p-31f;
  }

  geometry geometry_;
  index_t tokens_;
  std::vector<T> keys_, values_, query_;
  std::uint64_t state_ = 88172645463325252u;
};

}  // namespace bench
