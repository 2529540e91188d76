// SPDX-License-Identifier: Apache-2.0
// Writes stand-ins into a cache on a device, rounded to the cache's element type.
#pragma once

#include "refreekv/cache/source.hpp"
#include "refreekv/cuda/block/element.hpp"
#include "refreekv/cuda/block/places.hpp"
#include "refreekv/cuda/block/row_parts.hpp"
#include "refreekv/decision/stand_ins.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Returns the bits of the half nearest to x, ties to even. Values out of range become the largest
/// finite half. NaN stays NaN.
[[nodiscard]] REFREEKV_DEVICE std::uint16_t half_bits(float x) noexcept {
  const std::uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000u;
  const float magnitude = as_float(bits & 0x7fffffffu);
  if (magnitude != magnitude) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 65504) return static_cast<std::uint16_t>(sign | 0x7bffu);
  if (magnitude < 0x1p-14f) {  // 0.5f's last bit is worth as much as a denormal half's
    return static_cast<std::uint16_t>(sign | (as_bits(magnitude + 0.5f) - as_bits(0.5f)));
  }
  const std::uint32_t own = as_bits(magnitude) - (112u << 23);
  return static_cast<std::uint16_t>(sign | (own + 0xfffu + (own >> 13 & 1)) >> 13);
}

/// As half_bits, but for bfloat16.
[[nodiscard]] REFREEKV_DEVICE std::uint16_t bf16_bits_of(float x) noexcept {
  const std::uint32_t bits = as_bits(x);
  if (x != x) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
  if ((bits & 0x7fffffffu) >= 0x7f7f0000u) {
    return static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | 0x7f7fu);
  }
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/// Writes the stand-ins of each KV head into the slots beside its kept tokens, a thread per
/// element.
template <kv_source Source>
struct write_stand_ins_body {
  using memory = typename Source::memory;
  using element_type = typename Source::element_type;
  static_assert(!std::is_const_v<element_type> && sizeof(stored<element_type>) > 1,
                "stand-ins are float, half or bfloat16, as the cache is");
  struct shared {};

  Source source;
  view<const kept_tokens, 2, memory> kept;
  view<const float, 4, memory> rows;  ///< [sequence, kv_head, stand_in, head_dim]
  view<const position_t, 2, memory> counts;
  compaction mode;
  row_parts cut;  ///< of each KV head's elements

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const auto [sequence, kv_head, part, head] =
        part_place::of(item, source.shape().kv_heads, cut.parts);
    const index_t count = counts(sequence, kv_head), dims = source.shape().head_dim;
    const index_t first = first_stand_in(kept(sequence, kv_head), count, mode);
    for (index_t i = part * block_threads + block.rank(); i < count * dims;
         i += cut.parts * block_threads) {
      const index_t row = i / dims, d = i % dims;
      const auto run = source.run_at(sequence, kv_head, first + row);
      const float x = rows(sequence, kv_head, row, d);
      void* const to = run.data + d * run.dim_stride;
      // Copies bits, because an engine's type may have no constructor that device code can call.
      if constexpr (std::is_same_v<stored<element_type>, float>) {
        std::memcpy(__builtin_assume_aligned(to, alignof(element_type)), &x, sizeof x);
      } else {
        const std::uint16_t bits = std::is_same_v<stored<element_type>, refreekv::bf16_bits>
                                       ? bf16_bits_of(x)
                                       : half_bits(x);
        std::memcpy(__builtin_assume_aligned(to, alignof(element_type)), &bits, sizeof bits);
      }
    }
  }
};

/// The primitive `write_stand_ins`: see `ops`.
template <class Backend, kv_source Source>
[[nodiscard]] status write_stand_ins(
    const Backend& exec, const Source& source,
    const view<const kept_tokens, 2, typename Source::memory>& kept,
    const view<const float, 4, typename Source::memory>& rows,
    const view<const position_t, 2, typename Source::memory>& counts, compaction mode) noexcept {
  const row_parts cut =
      row_parts::of(kv_head_items(source), blocks_for(rows.extent(2) * source.shape().head_dim));
  const write_stand_ins_body<Source> body{source, kept, rows, counts, mode, cut};
  return run_blocks(exec, cut.items(), body);
}

}  // namespace refreekv::inline v0::cuda_detail
