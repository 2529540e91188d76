// SPDX-License-Identifier: Apache-2.0
// The caches of known engines as sources: one line turns the pointer of a pool into keys and
// values.
#pragma once

#include "refreekv/cache/dense.hpp"
#include "refreekv/cache/paged.hpp"

namespace refreekv::inline v0 {

/// Two sources that hold the same tokens.
template <class Keys, class Values>
struct keys_and_values {
  Keys keys;
  Values values;
};
template <class Keys, class Values>
keys_and_values(Keys, Values) -> keys_and_values<Keys, Values>;

namespace layouts {

/// The axes of a cache in memory. `kv` separates keys from values where one tensor holds both.
/// `page` is a page of a pool, or a sequence if each sequence has its own part of the tensor.
enum class axis { layer, page, kv, kv_head, token, dim };
using enum axis;

/// The extents of a cache. A layout ignores extents of axes that it does not have.
struct extents {
  index_t pages;        ///< pages of the pool; in a dense cache, sequences
  index_t page_tokens;  ///< slots of a page; in a dense cache, of a sequence
  index_t kv_heads;
  index_t head_dim;
  index_t layers = 1;
  index_t layer = 0;  ///< the layer to read, in [0, layers)
};

/// The axes of a tensor in memory order; the last one is the fastest.
template <axis... Order>
struct axes {
  [[nodiscard]] static constexpr index_t count(axis which) noexcept {
    return (index_t{Order == which} + ... + 0);
  }
  static_assert(count(page) == 1 && count(kv_head) == 1 && count(token) == 1 && count(dim) == 1 &&
                    count(layer) <= 1 && count(kv) <= 1,
                "a layout needs each of page, kv_head, token and dim once");

  /// Elements from one index of an axis to the next, where `halves` is the extent of kv; 0 if the
  /// tensor has no such axis.
  [[nodiscard]] static constexpr index_t stride(axis which, const extents& of,
                                                index_t halves) noexcept {
    if (count(which) == 0) return 0;
    const index_t sizes[] = {of.layers, of.pages, halves, of.kv_heads, of.page_tokens, of.head_dim};
    index_t elements = 1;
    bool inside = false;
    ((elements *= inside ? sizes[static_cast<int>(Order)] : 1, inside = inside || Order == which),
     ...);
    return elements;
  }
};

/// How an engine lays out keys and values. Call it with the pool, its extents, and where the tokens
/// of a sequence are: a page_table, or the lengths of the sequences of a dense cache. The sources
/// have the memory type of that last argument: host or device.
template <class Keys, class Values = Keys>
struct layout {
  /// From two tensors. Requires that neither has the kv axis.
  template <class K, class V, class Where>
  [[nodiscard]] constexpr auto operator()(K* keys, V* values, const extents& of,
                                          const Where& where) const noexcept {
    return sources(keys, values, 1, of, where);
  }

  /// From one tensor with the kv axis.
  template <class T, class Where>
    requires(Keys::count(kv) == 1)
  [[nodiscard]] constexpr auto operator()(T* pool, const extents& of,
                                          const Where& where) const noexcept {
    return sources(pool, pool + Keys::stride(kv, of, 2), 2, of, where);
  }

 private:
  template <class K, class V, class Where>
  static constexpr auto sources(K* keys, V* values, index_t halves, const extents& of,
                                const Where& where) noexcept {
    return keys_and_values{source(rows<Keys, Where>(keys, halves, of), where),
                           source(rows<Values, Where>(values, halves, of), where)};
  }

  template <class Axes, class Where, class T>
  static constexpr auto rows(T* data, index_t halves, const extents& of) noexcept {
    const auto stride = [&](axis which) { return Axes::stride(which, of, halves); };
    return view<T, 4, typename Where::memory>(
        data + of.layer * stride(layer), {of.pages, of.kv_heads, of.page_tokens, of.head_dim},
        {stride(page), stride(kv_head), stride(token), stride(dim)});
  }

  template <class T, class Index, class Memory>
  static constexpr auto source(view<T, 4, Memory> pool,
                               const page_table<Index, Memory>& table) noexcept {
    return paged<T, Index, Memory>(pool, table);
  }
  template <class T, class Memory>
  static constexpr auto source(view<T, 4, Memory> rows,
                               std::type_identity_t<lengths_view<Memory>> lengths) noexcept {
    return dense<T, Memory>(rows, lengths);
  }
};

/// vLLM up to 2025: (2, blocks, block_size, kv_heads, head_size), in its two physical orders.
inline constexpr layout<axes<kv, page, token, kv_head, dim>> vllm_kv_first_nhd;
inline constexpr layout<axes<kv, page, kv_head, token, dim>> vllm_kv_first_hnd;
/// vLLM in 2026: (blocks, 2, block_size, kv_heads, head_size).
inline constexpr layout<axes<page, kv, token, kv_head, dim>> vllm_blocks_first;
/// vLLM from June 2026 on: (blocks, kv_heads, block_size, 2 * head_size), each value behind its
/// key.
inline constexpr layout<axes<page, kv_head, token, kv, dim>> vllm_packed;

/// FlashInfer, as one tensor or as two. Its indptr, indices and last_page_len are a
/// page_table::ragged.
inline constexpr layout<axes<page, kv, token, kv_head, dim>> flashinfer_nhd;
inline constexpr layout<axes<page, kv, kv_head, token, dim>> flashinfer_hnd;

/// TensorRT-LLM: [block][layer][2][kv_head][token][head_dim]. If each layer has a pointer of its
/// own, `layers` is 1.
inline constexpr layout<axes<page, layer, kv, kv_head, token, dim>> tensorrt_llm;

/// SGLang: k_buffer and v_buffer of a layer, [slot][kv_head][head_dim]. A page is one slot, and the
/// rows of the table are those of req_to_token.
inline constexpr layout<axes<page, token, kv_head, dim>> sglang;

/// llama.cpp: cache_k and cache_v of a layer, [stream][cell][kv_head][head_dim]. Without flash
/// attention values are transposed: [stream][kv_head][head_dim][cell].
inline constexpr layout<axes<page, token, kv_head, dim>> llama_cpp;
inline constexpr layout<axes<page, token, kv_head, dim>, axes<page, kv_head, dim, token>>
    llama_cpp_transposed;

}  // namespace layouts
}  // namespace refreekv::inline v0
