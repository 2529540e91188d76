// SPDX-License-Identifier: Apache-2.0
// The keys of a layer in 8 and 4 bits, filled with noise. key_bytes(): codes and blocks, without
// scales and ranges that lie apart.
#pragma once

#include "layer.hpp"

namespace bench {

/// Fills an array with random bytes.
template <class T>
void fill_bytes(const array<T>& codes) {
  std::uint64_t state = 88172645463325252u;
  auto* bytes = reinterpret_cast<std::uint8_t*>(codes.begin());
  for (const auto* end = reinterpret_cast<std::uint8_t*>(codes.end()); bytes != end; ++bytes) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    *bytes = static_cast<std::uint8_t>(state >> 56);
  }
}

/// 8-bit codes with one scale for each token. Keys have the deviation of synthetic_layer's.
template <class Code>
class scaled_layer {
 public:
  scaled_layer(const geometry& g, index_t tokens)
      : shape_{1, g.kv_heads, tokens, g.head_dim},
        codes_(g.kv_heads * tokens * g.head_dim),
        scales_(g.kv_heads * tokens) {
    fill_bytes(codes_);
    constexpr bool is_fp8 = std::is_same_v<Code, refreekv::fp8_e4m3_bits>;
    if constexpr (is_fp8) {
      for (Code& code : codes_) code.bits &= 0xb7;  // up to 0.94, and no NaN
    }
    for (float& scale : scales_) scale = is_fp8 ? 2.6f : 1.7f / 127;
  }
  auto keys() const {
    const auto& [sequences, heads, tokens, dims] = shape_;
    return refreekv::scaled_keys{
        refreekv::dense(refreekv::view(codes_.begin(), {sequences, heads, tokens, dims})),
        refreekv::dense(refreekv::view(scales_.begin(), {sequences, heads, tokens, index_t{1}}))};
  }
  std::span<const std::byte> key_bytes() const { return codes_.bytes(); }

 private:
  refreekv::cache_shape shape_;
  array<Code> codes_;
  array<float> scales_;
};

/// ggml's blocks.
template <class Block>
class block_layer {
 public:
  block_layer(const geometry& g, index_t tokens)
      : shape_{1, g.kv_heads, tokens, g.head_dim / refreekv::block_dims},
        blocks_(g.kv_heads * tokens * shape_.head_dim) {
    fill_bytes(blocks_);
    const bool is_q8 = std::is_same_v<Block, refreekv::q8_0_block>;
    const std::uint16_t scale = is_q8 ? 0x22dbu : 0x32ccu;  // 1.7 / 127, 1.7 / 8
    for (Block& block : blocks_) block.scale.bits = scale;
  }
  auto keys() const {
    const auto& [sequences, heads, tokens, blocks] = shape_;
    return refreekv::block_keys{
        refreekv::dense(refreekv::view(blocks_.begin(), {sequences, heads, tokens, blocks}))};
  }
  std::span<const std::byte> key_bytes() const { return blocks_.bytes(); }

 private:
  refreekv::cache_shape shape_;
  array<Block> blocks_;
};

/// The library's 4-bit keys.
class int4_layer {
 public:
  int4_layer(const geometry& g, index_t tokens)
      : shape_{1, g.kv_heads, tokens, g.head_dim},
        codes_(g.kv_heads * tokens * g.head_dim / 2),
        ranges_(g.kv_heads * tokens * 2) {
    fill_bytes(codes_);
    bool is_low = false;
    for (float& x : ranges_) x = (is_low = !is_low) ? -1.7f : 3.4f / 15;
  }
  auto keys() const {
    const auto& [sequences, heads, tokens, dims] = shape_;
    return refreekv::int4_keys<>{
        .codes = refreekv::view(codes_.begin(), {sequences, heads, tokens, dims / 2}),
        .ranges = refreekv::view(ranges_.begin(), {sequences, heads, tokens, index_t{2}}),
        .dims = dims,
        .lengths = {}};
  }
  std::span<const std::byte> key_bytes() const { return codes_.bytes(); }

 private:
  refreekv::cache_shape shape_;
  array<std::uint8_t> codes_;
  array<float> ranges_;
};

}  // namespace bench
