// SPDX-License-Identifier: Apache-2.0
// Tables of GGUF tensor types.
#include "tensor_type.hpp"

#include <array>

namespace smollm2 {

tensor_block block_of(tensor_type type) {
  switch (type) {
    case tensor_type::f32: return {1, 4};
    case tensor_type::f16: return {1, 2};
    case tensor_type::q4_0:  // half scale; 32 nibbles
      return {32, 2 + 16};
    case tensor_type::q4_1:  // half scale, half minimum; 32 nibbles
      return {32, 2 + 2 + 16};
    case tensor_type::q8_0:  // half scale; 32 bytes
      return {32, 2 + 32};
  }
  return {1, 0};
}

std::string name_of(tensor_type type) {
  static constexpr std::array names{
      "F32",     "F16",    "Q4_0",    "Q4_1",  "Q4_2",   "Q4_3",  "Q5_0",  "Q5_1",
      "Q8_0",    "Q8_1",   "Q2_K",    "Q3_K",  "Q4_K",   "Q5_K",  "Q6_K",  "Q8_K",
      "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS",
      "I8",      "I16",    "I32",     "I64",   "F64",    "IQ1_M", "BF16"};
  const auto index = static_cast<std::size_t>(type);
  return index < names.size() ? names[index] : "number " + std::to_string(index);
}

}  // namespace smollm2
