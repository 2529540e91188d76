// SPDX-License-Identifier: Apache-2.0
// One decoder per block format, and the loop that runs it over a tensor.
#include "dequantize.hpp"

#include <Eigen/Core>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace smollm2 {
namespace {

// GGUF aligns tensors, not the fields of a block.
template <class T>
T load(const std::byte* source) {
  T value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

float load_half(const std::byte* source) {
  return static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(load<std::uint16_t>(source)));
}

void decode_f32(const std::byte* block, float* values) { values[0] = load<float>(block); }

void decode_f16(const std::byte* block, float* values) { values[0] = load_half(block); }

// The low nibbles of the 16 bytes are elements 0 to 15, the high nibbles elements 16 to 31.
void decode_nibbles(const std::byte* nibbles, float scale, float minimum, float* values) {
  for (std::size_t i = 0; i < 16; ++i) {
    const auto pair = load<std::uint8_t>(nibbles + i);
    values[i] = scale * static_cast<float>(pair & 0x0f) + minimum;
    values[i + 16] = scale * static_cast<float>(pair >> 4) + minimum;
  }
}

void decode_q4_0(const std::byte* block, float* values) {
  const float scale = load_half(block);
  decode_nibbles(block + 2, scale, -8 * scale, values);
}

void decode_q4_1(const std::byte* block, float* values) {
  decode_nibbles(block + 4, load_half(block), load_half(block + 2), values);
}

void decode_q8_0(const std::byte* block, float* values) {
  const float scale = load_half(block);
  for (std::size_t i = 0; i < 32; ++i) {
    values[i] = scale * static_cast<float>(load<std::int8_t>(block + 2 + i));
  }
}

using block_decoder = void (*)(const std::byte* block, float* values);

block_decoder decoder_of(tensor_type type) {
  switch (type) {
    case tensor_type::f32: return decode_f32;
    case tensor_type::f16: return decode_f16;
    case tensor_type::q4_0: return decode_q4_0;
    case tensor_type::q4_1: return decode_q4_1;
    case tensor_type::q8_0: return decode_q8_0;
  }
  throw std::invalid_argument("dequantize: cannot read type " + name_of(type));
}

}  // namespace

void dequantize(const gguf_tensor& tensor, std::span<float> values) {
  const block_decoder decode = decoder_of(tensor.type);
  if (values.size() != tensor.elements()) {
    throw std::invalid_argument("dequantize: room for all elements of the tensor is needed");
  }
  const tensor_block block = block_of(tensor.type);
  const std::byte* source = tensor.data.data();
  for (std::size_t i = 0; i < values.size(); i += block.elements, source += block.bytes) {
    decode(source, values.data() + i);
  }
}

}  // namespace smollm2
