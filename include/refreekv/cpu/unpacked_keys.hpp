// SPDX-License-Identifier: Apache-2.0
// Unpacks keys that are not stored as floats, one chunk at a time.
#pragma once

#include "refreekv/cache/int4_keys.hpp"
#include "refreekv/cpu/scan_scratch.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// A key source for the tokens [begin, end) of one KV head, unpacked to floats.
struct unpacked_keys {
  using element_type = const float;
  using memory = host_memory;

  const float* rows;  ///< [token - begin, head_dim]
  index_t begin, end, dims, batch, heads;

  [[nodiscard]] constexpr cache_shape shape() const noexcept { return {batch, heads, end, dims}; }
  [[nodiscard]] constexpr index_t tokens(index_t) const noexcept { return end; }
  [[nodiscard]] constexpr const char* invalid() const noexcept { return nullptr; }
  [[nodiscard]] constexpr token_run<const float> run_at(index_t, index_t,
                                                        index_t token) const noexcept {
    return {rows + (token - begin) * dims, end - token, dims, 1};
  }
};

/// Writes the keys of `tokens` as floats to rows [token, head_dim]. O(tokens * head_dim).
inline void unpack(const int4_keys<>& keys, index_t sequence, index_t kv_head, token_range tokens,
                   float* rows) noexcept {
  const float* centre = keys.centres.at(sequence, kv_head);
  for (index_t t = tokens.begin; t < tokens.end; ++t, rows += keys.dims) {
    const std::uint8_t* codes = keys.codes.at(sequence, kv_head, t);
    const float low = keys.ranges(sequence, kv_head, t, 0);
    const float step = keys.ranges(sequence, kv_head, t, 1);
    for (index_t d = 0; d < keys.dims; ++d) {
      const int code = d % 2 == 0 ? codes[d / 2] & 15 : codes[d / 2] >> 4;
      rows[d] = detail::int4_value(static_cast<float>(code), low, step);
    }
    for (index_t d = 0; centre != nullptr && d < keys.dims; ++d) rows[d] += centre[d];
  }
}

/// Whether a layer's keys must be unpacked before they are multiplied.
template <class Layer>
concept has_packed_keys = has_queries<Layer> && requires(const Layer& layer) { layer.keys.codes; };

/// The layer type that is multiplied: the layer itself, or the layer with unpacked keys.
template <class Layer>
struct readable {
  using type = Layer;
};
template <class Query>
struct readable<query_layer<Query, int4_keys<>>> {
  using type = query_layer<Query, unpacked_keys>;
};

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
