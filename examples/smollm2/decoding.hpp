// SPDX-License-Identifier: Apache-2.0
// This engine's caches, to be measured.
#pragma once

#include <concepts>

#include "decode_speed.hpp"
#include "llama.hpp"

namespace smollm2 {

template <std::derived_from<sequence_memory> Cache>
decoding_cache decoding(const llama& model, Cache& cache) {
  // Any token does: what it costs does not depend on it.
  return {[&] { model.decode(0, cache); },
          [&] {
            std::size_t rows = 0;
            for (std::size_t i = 0; i < cache.layers(); ++i) {
              const auto& layer = cache.layer(i);
              for (std::size_t h = 0; h < layer.kv_heads(); ++h) rows += layer.length(h);
            }
            return rows * cache.layer(0).head_dim() * 2 * sizeof(float);
          }};
}

}  // namespace smollm2
