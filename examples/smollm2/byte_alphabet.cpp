// SPDX-License-Identifier: Apache-2.0
// Bytes that print as themselves are their own letter; the other 68 are, in order, U+0100 to
// U+0143.
#include "byte_alphabet.hpp"

#include <array>
#include <cstddef>
#include <optional>
#include <stdexcept>

namespace smollm2 {
namespace {

constexpr std::size_t letters = 0x144;

constexpr bool prints_as_itself(std::size_t byte) {
  return (0x21 <= byte && byte <= 0x7e) || (0xa1 <= byte && byte <= 0xac) || 0xae <= byte;
}

// Code point -> byte, or -1 where the code point is no letter.
constexpr std::array<int, letters> byte_of_letter = [] {
  std::array<int, letters> table{};
  table.fill(-1);
  std::size_t next_letter = 0x100;
  for (std::size_t byte = 0; byte < 256; ++byte) {
    table[prints_as_itself(byte) ? byte : next_letter++] = static_cast<int>(byte);
  }
  return table;
}();

// All letters lie below U+0800: one or two UTF-8 units each.
std::optional<std::size_t> take_code_point(std::string_view& text) {
  const auto unit = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const bool wide = unit(0) >= 0x80;
  if (wide && (unit(0) >> 5 != 0b110 || text.size() < 2)) return std::nullopt;
  const std::size_t code_point = wide ? (unit(0) & 0x1fu) << 6 | (unit(1) & 0x3fu) : unit(0);
  text.remove_prefix(wide ? 2 : 1);
  return code_point;
}

}  // namespace

std::string bytes_of(std::string_view spelling) {
  std::string bytes;
  for (std::string_view rest = spelling; !rest.empty();) {
    const auto letter = take_code_point(rest);
    if (!letter || *letter >= letters || byte_of_letter[*letter] < 0) {
      throw std::runtime_error("the vocabulary entry '" + std::string(spelling) +
                               "' is not in the byte alphabet");
    }
    bytes.push_back(static_cast<char>(byte_of_letter[*letter]));
  }
  return bytes;
}

}  // namespace smollm2
