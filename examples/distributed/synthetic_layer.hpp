// SPDX-License-Identifier: Apache-2.0
// A layer after its prefill, made up: every row follows from its place, so that a rank can make its
// own part and nobody needs the whole.
#pragma once

#include <cmath>
#include <cstring>
#include <refreekv/core/view.hpp>

#include "geometry.hpp"

namespace distributed {

using element = refreekv::bf16_bits;

class synthetic_layer {
 public:
  synthetic_layer(const geometry& shape, index_t number, index_t tokens)
      : shape_(shape), number_(number), tokens_(tokens) {}

  const geometry& shape() const { return shape_; }
  index_t number() const { return number_; }
  index_t tokens() const { return tokens_; }

  // Rows of head_dim elements. q.k / sqrt(head_dim) is about the token's pull, give or take 1.
  void key(index_t kv_head, index_t token, element* row) const {
    const float pull = pull_of(kv_head, token) / std::sqrt(static_cast<float>(shape_.head_dim));
    write(row, pull, direction(kv_head), 1, noise_of(1, kv_head, token));
  }
  void value(index_t kv_head, index_t token, element* row) const {
    write(row, 0, direction(kv_head), 1, noise_of(2, kv_head, token));
  }
  // Of the last token but `age`.
  void query(index_t age, index_t q_head, element* row) const {
    write(row, 1, direction(q_head / shape_.group()), 0.3f, noise_of(3, q_head, age));
  }

 private:
  // As in real models: sinks draw attention, distance costs it, a needle here and there keeps it.
  // How fast it falls is the layer's and the head's own.
  float pull_of(index_t kv_head, index_t token) const {
    if (token < 4) return 4;
    const float fall = 2 + 5 * uniform(noise_of(4, kv_head, 0));
    const auto distance = static_cast<float>(tokens_ - 1 - token);
    const bool is_needle = uniform(noise_of(5, kv_head, token)) < 0.001f;
    return (is_needle ? 3.0f : 0.0f) - fall * distance / static_cast<float>(tokens_);
  }

  // Seeds of what is random about a place.
  std::uint64_t direction(index_t kv_head) const { return noise_of(6, kv_head, 0); }
  std::uint64_t noise_of(index_t purpose, index_t head, index_t token) const {
    std::uint64_t seed = 0;
    for (const index_t part : {number_, purpose, head, token}) {
      seed = mixed(seed + static_cast<std::uint64_t>(part));
    }
    return seed;
  }

  // A row of +-along, and noise of mean 0 and variance spread^2 on top.
  void write(element* row, float along, std::uint64_t signs, float spread,
             std::uint64_t noise) const {
    for (index_t d = 0; d < shape_.head_dim; ++d) {
      const auto i = static_cast<std::uint64_t>(d);
      const float sign = (mixed(signs + i) >> 63) != 0 ? -1.0f : 1.0f;
      row[d] = rounded(sign * along + spread * bell(mixed(noise + i)));
    }
  }
  // Of mean 0 and variance 1: the sum of four.
  static float bell(std::uint64_t bits) {
    std::uint64_t sum = 0;
    for (unsigned shift = 0; shift < 64; shift += 16) sum += bits >> shift & 0xffff;
    return (static_cast<float>(sum) / 65536.0f - 2) * 1.7320508f;
  }
  static float uniform(std::uint64_t bits) { return static_cast<float>(bits >> 40) / 16777216.0f; }
  // splitmix64
  static std::uint64_t mixed(std::uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
  }
  static element rounded(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }

  geometry shape_;
  index_t number_, tokens_;
};

}  // namespace distributed
