// SPDX-License-Identifier: Apache-2.0
// The shapes of real models' attention layers.
#pragma once

#include <refreekv/core/config.hpp>
#include <span>
#include <string_view>

namespace distributed {

using refreekv::index_t;

struct geometry {
  std::string_view name;
  index_t q_heads, kv_heads, head_dim;

  // Query heads of a KV head.
  index_t group() const { return q_heads / kv_heads; }
};

inline constexpr geometry geometries[] = {
    {"llama3_8b", 32, 8, 128},
    {"llama3_1b", 32, 8, 64},
    {"smollm2", 9, 3, 64},
};

}  // namespace distributed
