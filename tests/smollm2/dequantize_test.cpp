// SPDX-License-Identifier: Apache-2.0
// Hand-made blocks of every type decode to the numbers they stand for.
#include "dequantize.hpp"

#include <cstdint>
#include <string>
#include <vector>

#include "catch.hpp"
#include "gguf_writer.hpp"

using namespace smollm2;
using namespace smollm2_test;

namespace {

constexpr std::uint16_t half_one = 0x3c00;
constexpr std::uint16_t half_minus_two = 0xc000;
constexpr std::uint16_t half_smallest = 0x0001;  // 2^-24, a subnormal

std::vector<float> decode(std::uint32_t type, const std::vector<std::uint64_t>& shape,
                          const std::string& blocks) {
  const temporary_file file(gguf_writer().add_tensor("t", shape, type, blocks).bytes());
  const gguf_file read(file.path());
  std::vector<float> values(read.tensor("t").elements());
  dequantize(read.tensor("t"), values);
  return values;
}

// Sixteen bytes whose low nibbles count up and whose high nibbles count down.
std::string nibbles() {
  std::string bytes;
  for (int i = 0; i < 16; ++i) bytes.push_back(static_cast<char>(i | (15 - i) << 4));
  return bytes;
}

}  // namespace

TEST_CASE("F16 covers subnormal and negative numbers") {
  const std::string halves =
      byte_stream().number(half_one).number(half_minus_two).number(half_smallest).bytes();
  CHECK(decode(1, {3}, halves) == std::vector<float>{1, -2, 0x1p-24f});
}

TEST_CASE("Q4_0 is scale * (nibble - 8)") {
  const auto values = decode(2, {32}, byte_stream().number(half_minus_two).raw(nibbles()).bytes());
  for (std::size_t i = 0; i < 16; ++i) {
    CHECK(values[i] == -2 * (static_cast<float>(i) - 8));
    CHECK(values[i + 16] == -2 * (15 - static_cast<float>(i) - 8));
  }
}

TEST_CASE("Q4_1 is scale * nibble + minimum") {
  const auto values =
      decode(3, {32}, byte_stream().number(half_one).number(half_minus_two).raw(nibbles()).bytes());
  for (std::size_t i = 0; i < 16; ++i) {
    CHECK(values[i] == static_cast<float>(i) - 2);
    CHECK(values[i + 16] == 15 - static_cast<float>(i) - 2);
  }
}

TEST_CASE("Q8_0 is scale * signed byte, block after block") {
  byte_stream blocks;
  for (const std::uint16_t scale : {half_one, half_minus_two}) {
    blocks.number(scale);
    for (int i = 0; i < 32; ++i) blocks.number(static_cast<std::int8_t>(8 * i - 128));
  }
  const auto values = decode(8, {2, 32}, blocks.bytes());
  for (std::size_t i = 0; i < 32; ++i) {
    CHECK(values[i] == 8 * static_cast<float>(i) - 128);
    CHECK(values[i + 32] == -2 * (8 * static_cast<float>(i) - 128));
  }
}
