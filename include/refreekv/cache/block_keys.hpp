// SPDX-License-Identifier: Apache-2.0
// Keys in blocks of 32 dimensions with one scale each, as llama.cpp's q8_0 and q4_0 caches hold
// them.
#pragma once

#include "refreekv/cache/source.hpp"

namespace refreekv::inline v0 {

/// 32 dimensions in 8 bits: dimension d is scale * codes[d]. (ggml's block_q8_0)
struct q8_0_block {
  f16_bits scale;
  std::int8_t codes[32];
};

/// 32 dimensions in 4 bits: scale * (code - 8). The code of dimension d < 16 is in the low half of
/// codes[d], that of dimension d + 16 in its high half. (ggml's block_q4_0)
struct q4_0_block {
  f16_bits scale;
  std::uint8_t codes[16];
};

static_assert(sizeof(q8_0_block) == 34 && sizeof(q4_0_block) == 18);

/// The dimensions of a block.
inline constexpr index_t block_dims = 32;

/// The types of blocks, as elements of a source.
template <class T>
concept block_element = std::same_as<std::remove_const_t<T>, q8_0_block> ||
                        std::same_as<std::remove_const_t<T>, q4_0_block>;

/// Keys whose rows are blocks: `rows` is a source of q8_0_block or q4_0_block, in any layout, whose
/// head_dim and strides count blocks (ggml's nb[i] / sizeof(block)). Observe `block_keys{rows}`,
/// for many layers `block_keys{layered{...}}`; compact and copy `rows`. `quantise`, `bound_pages`
/// and `with_values` want rows of floats and do not take it.
/// `reinterpret_cast<q8_0_block*>(tensor->data)` states what the bytes of a ggml tensor mean. Where
/// the engine treats denormals as zero, scales below 6e-5 are 0.
template <kv_source Rows>
  requires block_element<typename Rows::element_type>
struct block_keys {
  using memory = typename Rows::memory;

  Rows rows;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr cache_shape shape() const noexcept {
    cache_shape shape = rows.shape();
    shape.head_dim *= block_dims;
    return shape;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    return rows.tokens(sequence);
  }
  [[nodiscard]] constexpr const char* invalid() const noexcept { return rows.invalid(); }
};
template <class Rows>
block_keys(Rows) -> block_keys<Rows>;

namespace detail {

/// Returns the code of a dimension of a block, d in [0, 32). The dimension is scale * code.
[[nodiscard]] REFREEKV_SHARED int block_code(const q8_0_block& block, int d) noexcept {
  return block.codes[d];
}
[[nodiscard]] REFREEKV_SHARED int block_code(const q4_0_block& block, int d) noexcept {
  return (d < 16 ? block.codes[d] & 15 : block.codes[d - 16] >> 4) - 8;
}

}  // namespace detail

}  // namespace refreekv::inline v0
