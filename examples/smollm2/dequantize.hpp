// SPDX-License-Identifier: Apache-2.0
// Turns the blocks of a GGUF tensor into float32.
#pragma once

#include <span>

#include "gguf.hpp"

namespace smollm2 {

// `values` takes all elements of the tensor, in C order.
void dequantize(const gguf_tensor& tensor, std::span<float> values);

}  // namespace smollm2
