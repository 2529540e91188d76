// SPDX-License-Identifier: Apache-2.0
// The caches of several layers as one batch, so that one call decides about all of them.
#pragma once

#include "refreekv/cache/aliasing.hpp"

namespace refreekv::inline v0 {

/// One source for each layer, all of one shape. Sequence s of layer l is sequence l * batch + s of
/// the whole; queries and decisions have the same order. On a device the table of sources is in
/// device memory. Sources are trivially copyable, so the caller copies the table there once, as it
/// would copy pointers. Keys in 8 or 4 bits are wrapped outside: block_keys{layered{rows, ...}}.
/// A policy that depends on a layer's number treats all of them as layer info.index. So leave out
/// the layers that are never pruned (the first full_layers), and pass one layer at a time to
/// pyramidkv and cake.
template <kv_source Source>
class layered {
 public:
  using element_type = typename Source::element_type;
  using memory = typename Source::memory;

  /// layers: [layer]. example: any of the layers, or a source of their shape.
  constexpr layered(view<const Source, 1, memory> layers, const Source& example) noexcept
      : layers_(layers), example_(example) {}

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr cache_shape shape() const noexcept {
    cache_shape shape = example_.shape();
    shape.sequences *= layers_.extent(0);
    return shape;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    const index_t batch = example_.shape().sequences;
    return layers_(sequence / batch).tokens(sequence % batch);
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_run<element_type> run_at(
      index_t sequence, index_t kv_head, index_t token) const noexcept {
    const index_t batch = example_.shape().sequences;
    return layers_(sequence / batch).run_at(sequence % batch, kv_head, token);
  }
  /// Null, or the error that two layers are one cache, or that a layer names written memory twice.
  template <class Written>
  [[nodiscard]] constexpr const char* written_twice(const Written& written) const noexcept {
    const index_t batch = example_.shape().sequences, kv_heads = example_.shape().kv_heads;
    const auto is_written = [&](index_t l) {
      for (index_t i = 0; i < batch * kv_heads; ++i) {
        const token_range range = written(l * batch + i / kv_heads, i % kv_heads);
        if (range.begin != range.end) return true;
      }
      return false;
    };
    for (index_t l = 0; l < layers_.extent(0); ++l) {
      if (!is_written(l)) continue;
      const auto of_layer = [&](index_t s, index_t h) { return written(l * batch + s, h); };
      if (const char* why = detail::written_twice(layers_(l), of_layer)) return why;
      for (index_t m = 0; m < l; ++m) {
        if (detail::share_memory(layers_(m), layers_(l)) != nullptr && is_written(m)) {
          return "layers share a cache, which would move twice: pass one of them";
        }
      }
    }
    return nullptr;
  }
  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (layers_.malformed()) return "layers need a pointer and an extent >= 0";
    if constexpr (std::same_as<memory, host_memory>) {
      for (index_t l = 0; l < layers_.extent(0); ++l) {
        const Source& layer = layers_(l);
        if (const char* why = layer.invalid()) return why;
        if (layer.shape() != example_.shape()) return "layers differ in shape";
      }
    }
    return example_.invalid();
  }

 private:
  view<const Source, 1, memory> layers_;
  Source example_;
};

}  // namespace refreekv::inline v0
