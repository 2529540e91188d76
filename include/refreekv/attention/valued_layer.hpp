// SPDX-License-Identifier: Apache-2.0
// The values of a layer, for policies that read more than keys.
#pragma once

#include "refreekv/attention/layer.hpp"
#include "refreekv/cache/fit.hpp"

namespace refreekv::inline v0 {

/// A layer of keys and queries with the values of these keys. Keys and values may differ in type,
/// layout and head_dim. Values may be a part of the keys (MLA).
template <model_layer Layer, kv_source Values>
struct valued_layer : Layer {
  using plain_type = Layer;

  Values values;

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (const char* why = Layer::invalid()) return why;
    return detail::differ(values, this->keys);
  }
};

/// Returns the layer with its values. O(1).
template <model_layer Layer, kv_source Values>
  requires requires(const Layer& layer) { layer.queries; }
[[nodiscard]] constexpr auto with_values(const Layer& layer, const Values& values) noexcept {
  static_assert(
      kv_source<std::remove_cvref_t<decltype(layer.keys)>>,
      "values belong to keys that are rows of floats on one rank: policies that read them "
      "take no scaled_keys, block_keys, int4_keys or shard");
  detail::check_source<Values>();
  return valued_layer<Layer, Values>{{layer}, values};
}

}  // namespace refreekv::inline v0
