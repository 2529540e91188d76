// SPDX-License-Identifier: Apache-2.0
// A policy's input for one layer: the concepts, the description and the window. Types: observe.hpp.
#pragma once

#include "refreekv/attention/attention_params.hpp"
#include "refreekv/attention/query_window.hpp"
#include "refreekv/cache/source.hpp"

namespace refreekv::inline v0 {

/// The query rows of a layer's window that exist, and the tokens that each row sees. Needed only
/// where some rows do not exist, or where a row sees other tokens than all up to its own. Both
/// views may have strides. Neither is read past the batch's sequences.
template <class Memory = host_memory>
struct window_rows {
  /// [sequence], in [0, window]: the number of rows that a sequence has. They are the last
  /// counts(s) rows; the values of the rows before them do not matter. No pointer: all rows exist.
  /// For batches whose sequences have different numbers of queries: decoding beside a prefill, hits
  /// of a prefix cache, the short last piece of a prompt, drafts that are verified.
  lengths_view<Memory> counts = {};
  /// [sequence, window], in [1, tokens(s)]: row r sees tokens [0, ends(s, r)). No pointer:
  /// attention is causal along the cache. For prefixes whose tokens see each other (PaliGemma, the
  /// images of Gemma 3), and for cross attention. In cross attention every row sees every token:
  /// pass the lengths, with a stride of 0 along the window. Sliding windows and ALiBi still use
  /// tokens(s) - window + r as the position of row r.
  view<const position_t, 2, Memory> ends = {};
};

/// The index of a layer whose number is not set.
inline constexpr index_t unknown_layer = -1;

/// The description of a layer, besides its tensors.
template <class Memory = host_memory>
struct layer_info {
  /// 0-based. Policies that treat layers differently require it. The default is no layer's number;
  /// with a default of 0 every layer would be the first one.
  index_t index = unknown_layer;
  attention_params<Memory> attention = {};
  window_rows<Memory> rows = {};
};

/// One layer of a ragged batch. All sizes are of the whole batch, except tokens(sequence).
/// - `invalid()`: null, or the reason in words why the description is invalid. O(tables).
template <class O>
concept model_layer = requires(const O& layer, index_t sequence) {
  typename O::memory;
  { layer.shape() } -> std::same_as<cache_shape>;
  { layer.sequences() } -> std::same_as<index_t>;
  { layer.q_heads() } -> std::same_as<index_t>;
  { layer.kv_heads() } -> std::same_as<index_t>;
  { layer.capacity() } -> std::same_as<index_t>;
  { layer.tokens(sequence) } -> std::same_as<index_t>;
  { layer.invalid() } -> std::same_as<const char*>;
  { layer.info } -> std::convertible_to<layer_info<typename O::memory>>;
};

/// A layer with attention: the last `window()` rows of each query head.
template <class O>
concept attention_layer = model_layer<O> && requires(const O& layer) {
  { layer.window() } -> std::same_as<index_t>;
};

/// A layer of keys whose tokens are split over ranks (context parallel): see shard.hpp.
template <class O>
concept sharded_layer = model_layer<O> && requires(const O& layer) {
  requires sharded_source<std::remove_cvref_t<decltype(layer.keys)>>;
};

namespace detail {

/// Whether this rank has the chunk that begins with `token`.
template <class O>
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr bool has_chunk_at(
    [[maybe_unused]] const O& layer, [[maybe_unused]] index_t sequence,
    [[maybe_unused]] index_t token) noexcept {
  if constexpr (sharded_layer<O>) {
    return layer.keys.owns(sequence, token);
  } else {
    return true;
  }
}

template <class O>
[[nodiscard]] constexpr const char* invalid_layer(const O& layer) noexcept {
  if (layer.capacity() > max_count) return "a sequence may have 2^31 - 1 tokens at most";
  if (layer.sequences() > max_count) return "a batch may have 2^31 - 1 sequences at most";
  if (layer.info.index < unknown_layer) return "layer_info::index must be >= 0";
  if (layer.kv_heads() < 1) return "kv_heads must be >= 1";
  if (layer.q_heads() < 1 || layer.q_heads() > max_count) return "q_heads must be in [1, 2^31 - 1]";
  if (layer.q_heads() % layer.kv_heads() != 0) return "q_heads must be a multiple of kv_heads";
  return nullptr;
}

template <class O>
[[nodiscard]] constexpr const char* invalid_window(const O& layer) noexcept {
  const auto& [counts, ends] = layer.info.rows;
  if (counts.data() != nullptr && (counts.malformed() || counts.extent(0) != layer.sequences())) {
    return "row counts must be [sequence]";
  }
  if (ends.data() != nullptr && (ends.malformed() || ends.extent(0) != layer.sequences() ||
                                 ends.extent(1) != layer.window())) {
    return "row ends must be [sequence, window]";
  }
  if constexpr (std::same_as<typename O::memory, host_memory>) {
    for (index_t s = 0; s < layer.sequences(); ++s) {
      if (counts.data() != nullptr && (counts(s) < 0 || counts(s) > layer.window())) {
        return "a row count is outside [0, window]";
      }
      if (layer.tokens(s) == 0) continue;
      if (counts.data() == nullptr && layer.window() < 1) return "a window of no rows";
      const index_t count = counts.data() == nullptr ? layer.window() : index_t{counts(s)};
      for (index_t r = layer.window() - count; ends.data() != nullptr && r < layer.window(); ++r) {
        if (ends(s, r) < 1 || ends(s, r) > layer.tokens(s))
          return "a row end is outside [1, tokens]";
      }
    }
  }
  return nullptr;
}

/// The layer without the members that decorators add (page bounds, values ...).
template <model_layer Layer>
[[nodiscard]] constexpr const auto& plain(const Layer& layer) noexcept {
  if constexpr (requires { typename Layer::plain_type; }) {
    return detail::plain(static_cast<const typename Layer::plain_type&>(layer));
  } else {
    return layer;
  }
}

}  // namespace detail

/// The query window of the last `rows` rows of a sequence. Requires 0 <= rows <= layer.window().
template <class Layer>
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr query_window window_of(const Layer& layer,
                                                                    index_t sequence,
                                                                    index_t rows) noexcept {
  query_window window{layer.tokens(sequence), rows, layer.info.attention.sliding_window};
  const auto& [counts, ends] = layer.info.rows;
  if (counts.data() != nullptr) {
    const index_t count = counts(sequence);
    window.missing = count < 0 ? rows : count < rows ? rows - count : 0;
  }
  if (ends.data() != nullptr) {
    window.ends = ends.at(sequence, layer.window() - rows);
    window.ends_stride = ends.stride(1);
  }
  return window;
}

}  // namespace refreekv::inline v0
