// SPDX-License-Identifier: Apache-2.0
// The shapes of attention that are measured, by the name of the model they belong to.
#pragma once

#include <array>

#include "refreekv/core/config.hpp"

namespace bench {

using refreekv::index_t;

struct geometry {
  const char* name;
  index_t q_heads, kv_heads, head_dim;
  index_t layers;
};

inline constexpr std::array<geometry, 5> geometries{{{"llama3_8b", 32, 8, 128, 32},
                                                     {"llama3_70b", 64, 8, 128, 80},
                                                     {"mistral_7b", 32, 8, 128, 32},
                                                     {"qwen2_5_7b", 28, 4, 128, 28},
                                                     {"smollm2", 9, 3, 64, 30}}};

}  // namespace bench
