// SPDX-License-Identifier: Apache-2.0
// Keys of a problem in 8 or 4 bits. Each cache replaces the problem's keys by the numbers that its
// codes mean, as the library decodes them, so that the oracle reads what the cache holds.
#pragma once

#include <algorithm>
#include <array>

#include "catch.hpp"
#include "estimates.hpp"
#include "random_problem.hpp"
#include "refreekv/cache/block_keys.hpp"
#include "refreekv/cache/scaled_keys.hpp"
#include "refreekv/cpu/backend.hpp"
#include "refreekv/key_index.hpp"

/// Calls f(sequence, kv_head, token, row of the rows in that order) for all keys of a problem.
template <class F>
void for_each_key_of(const problem& p, const F& f) {
  index_t row = 0;
  for (index_t s = 0; s < p.sequences(); ++s) {
    for (index_t h = 0; h < p.keys.kv_heads; ++h) {
      for (index_t t = 0; t < p.keys.longest(); ++t, ++row) {
        if (t < p.lengths[size(s)]) f(s, h, t, row);
      }
    }
  }
}

/// 8-bit codes with a scale for each token.
template <class Code>
class scaled_cache {
 public:
  static constexpr index_t dims_of_row = 1;  ///< head_dim is a multiple of this

  explicit scaled_cache(problem& p)
      : lengths_(p.lengths),
        shape_{p.sequences(), p.keys.kv_heads, p.keys.longest(), p.head_dim},
        codes_(size(shape_.sequences * shape_.kv_heads * shape_.capacity * shape_.head_dim)),
        scales_(size(shape_.sequences * shape_.kv_heads * shape_.capacity)) {
    for_each_key_of(p, [&](index_t s, index_t h, index_t t, index_t row) {
      float largest = 1e-6f;
      for (index_t d = 0; d < p.head_dim; ++d) {
        largest = std::max(largest, std::abs(p.keys.at(s, h, t, d)));
      }
      const float scale = scales_[size(row)] = largest / widest();
      for (index_t d = 0; d < p.head_dim; ++d) {
        Code& code = codes_[size(row * p.head_dim + d)];
        code = code_of(p.keys.at(s, h, t, d) / scale);
        p.keys.at(s, h, t, d) = refreekv::cpu_detail::widen(code) * scale;
      }
    });
  }
  auto keys() const {
    const refreekv::lengths_view<> lengths(lengths_.data(), {shape_.sequences});
    const auto& [sequences, heads, capacity, dims] = shape_;
    return refreekv::scaled_keys{
        refreekv::dense(refreekv::view(codes_.data(), {sequences, heads, capacity, dims}), lengths),
        refreekv::dense(refreekv::view(scales_.data(), {sequences, heads, capacity, index_t{1}}),
                        lengths)};
  }

 private:
  static constexpr bool is_integer = std::is_same_v<Code, std::int8_t>;
  static constexpr float widest() { return is_integer ? 127 : 448; }

  static Code code_of(float x) {
    if constexpr (is_integer) {
      return static_cast<Code>(std::lrint(x));
    } else {
      static const auto positive = [] {
        std::array<float, 127> values{};
        for (std::uint8_t i = 0; i < 127; ++i) values[i] = refreekv::cpu_detail::widen(Code{i});
        return values;
      }();
      const auto above = std::lower_bound(positive.begin(), positive.end() - 1, std::abs(x));
      const bool down = above != positive.begin() && std::abs(x) - above[-1] < *above - std::abs(x);
      const auto magnitude = static_cast<unsigned>(above - positive.begin()) - (down ? 1u : 0u);
      return {static_cast<std::uint8_t>(magnitude | (x < 0 ? 0x80u : 0u))};
    }
  }

  std::vector<position_t> lengths_;
  refreekv::cache_shape shape_;
  std::vector<Code> codes_;
  std::vector<float> scales_;
};

/// Blocks of 32 dimensions, quantised as ggml does. There is a block of noise before each, so
/// strides count; blocks are aligned to 2 bytes only.
template <class Block>
class block_cache {
 public:
  static constexpr index_t dims_of_row = refreekv::block_dims;

  explicit block_cache(problem& p)
      : lengths_(p.lengths),
        shape_{p.sequences(), p.keys.kv_heads, p.keys.longest(), p.head_dim / dims_of_row},
        blocks_(
            size(2 * shape_.sequences * shape_.kv_heads * shape_.capacity * shape_.head_dim + 1)) {
    for (Block& block : blocks_) block.scale.bits = 0x7e00;  // NaN
    for_each_key_of(p, [&](index_t s, index_t h, index_t t, index_t row) {
      for (index_t b = 0; b < shape_.head_dim; ++b) {
        pack(&p.keys.at(s, h, t, b * dims_of_row),
             blocks_[size(2 * (row * shape_.head_dim + b) + 1)]);
      }
    });
  }
  auto keys() const {
    const auto& [sequences, heads, capacity, blocks] = shape_;
    const index_t row = 2 * blocks;
    return refreekv::block_keys{
        refreekv::dense(refreekv::view(blocks_.data() + 1, {sequences, heads, capacity, blocks},
                                       {heads * capacity * row, capacity * row, row, index_t{2}}),
                        refreekv::lengths_view<>(lengths_.data(), {sequences}))};
  }

  /// Writes a block of 32 numbers, and replaces them by those that the block means.
  static void pack(float* x, Block& block) {
    const auto larger = [](float a, float b) { return std::abs(a) < std::abs(b); };
    const float largest = *std::max_element(x, x + dims_of_row, larger);
    constexpr bool is_q8 = std::is_same_v<Block, refreekv::q8_0_block>;
    const float step = is_q8 ? std::abs(largest) / 127 : largest / -8;
    block.scale = to_element<refreekv::f16_bits>(step);
    for (int d = 0; d < dims_of_row; ++d) {
      const float code = step > 0 || step < 0 ? x[d] / step : 0;
      if constexpr (is_q8) {
        block.codes[d] = static_cast<std::int8_t>(std::lrint(code));
      } else {
        const auto bits = static_cast<unsigned>(std::min(15.0f, code + 8.5f));
        std::uint8_t& pair = block.codes[d % 16];
        pair = static_cast<std::uint8_t>(d < 16 ? bits : pair | bits << 4);
      }
    }
    for (int d = 0; d < dims_of_row; ++d) {
      x[d] = static_cast<float>(refreekv::detail::block_code(block, d)) * to_float(block.scale);
    }
  }

 private:
  std::vector<position_t> lengths_;
  refreekv::cache_shape shape_;
  std::vector<Block> blocks_;
};

/// The library's own 4-bit keys, with centres.
class int4_cache {
 public:
  static constexpr index_t dims_of_row = 1;

  explicit int4_cache(problem& p)
      : made_(dense_cache<float>(p.keys).source(), p.lengths, 16, true) {
    const dense_cache<float> cache(p.keys);
    REQUIRE(quantise(refreekv::cpu_backend{}, cache.source(), made_.keys()) ==
            refreekv::status::ok);
    const refreekv::int4_keys<> codes = made_.keys();
    for_each_key_of(p, [&](index_t s, index_t h, index_t t, index_t) {
      for (index_t d = 0; d < p.head_dim; ++d) {
        p.keys.at(s, h, t, d) =
            refreekv::detail::int4_value(static_cast<float>(made_.code(s, h, t, d)),
                                         codes.ranges(s, h, t, 0), codes.ranges(s, h, t, 1)) +
            codes.centres(s, h, d);
      }
    });
  }
  auto keys() { return made_.keys(); }

 private:
  estimates made_;
};

/// A random problem whose keys a cache can hold.
template <class Cache>
problem packable_problem(random_source& random) {
  if (Cache::dims_of_row == 1) return random_problem(random);
  return random_problem(random, 1, {32, 64, 96, 288});
}
