// SPDX-License-Identifier: Apache-2.0
// How fast A alone decodes from its pages, pruned and not.
#pragma once

#include <vector>

#include "decode_speed.hpp"
#include "serving.hpp"

namespace paged {

struct decoding_speed {
  std::vector<page_release> releases;  // [layer]
  smollm2::speed_test test;
};

// Throws std::runtime_error where the model's context has no room for it.
decoding_speed measure_speed(const smollm2::llama& model, const serving_plan& plan, int threads,
                             const progress& on_progress);

}  // namespace paged
