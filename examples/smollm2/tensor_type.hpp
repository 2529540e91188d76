// SPDX-License-Identifier: Apache-2.0
// The element types a GGUF tensor can have: names, and block sizes of those this example reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace smollm2 {

enum class tensor_type : std::uint32_t { f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q8_0 = 8 };

// Elements are stored in blocks that lie along the fastest axis.
struct tensor_block {
  std::size_t elements;
  std::size_t bytes;
};

// {1, 0} for the types that this example does not read.
tensor_block block_of(tensor_type type);

std::string name_of(tensor_type type);

}  // namespace smollm2
