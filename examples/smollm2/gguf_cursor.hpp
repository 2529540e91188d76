// SPDX-License-Identifier: Apache-2.0
// Reads numbers, strings and metadata values from a GGUF file, one after the other.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gguf.hpp"

namespace smollm2 {

static_assert(std::endian::native == std::endian::little, "GGUF files are little-endian");

// Reads forward through the file. Containers only ever grow by what was really read, so that a
// damaged count ends in the "truncated" error and not in a huge allocation.
class gguf_cursor {
 public:
  gguf_cursor(const std::string& path, std::span<const std::byte> file)
      : path_(path), file_(file) {}

  std::size_t offset() const { return offset_; }

  [[noreturn]] void fail(const std::string& reason) const {
    throw std::runtime_error(path_ + " is not a valid GGUF file: " + reason);
  }

  [[noreturn]] void fail_truncated() const {
    throw std::runtime_error(path_ + " is a truncated GGUF file");
  }

  [[noreturn]] void fail_unreadable(const std::string& reason) const {
    throw std::runtime_error(path_ + ": " + reason +
                             "; this example reads F32, F16, Q4_0, Q4_1 and Q8_0");
  }

  template <class T>
  T number() {
    T value;
    std::memcpy(&value, next_bytes(sizeof value).data(), sizeof value);
    return value;
  }

  std::string_view string() {
    const std::span<const std::byte> bytes = next_bytes(number<std::uint64_t>());
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  gguf_value value() {
    const auto type = number<value_type>();
    switch (type) {
      case value_type::boolean: return number<std::uint8_t>() != 0;
      case value_type::float32:
      case value_type::float64: return floating(type);
      case value_type::string: return string();
      case value_type::array: return array();
      default: return integer(type);
    }
  }

 private:
  enum class value_type : std::uint32_t {
    uint8,
    int8,
    uint16,
    int16,
    uint32,
    int32,
    float32,
    boolean,
    string,
    array,
    uint64,
    int64,
    float64,
  };

  std::span<const std::byte> next_bytes(std::uint64_t bytes) {
    if (bytes > file_.size() - offset_) fail_truncated();
    const auto result = file_.subspan(offset_, bytes);
    offset_ += bytes;
    return result;
  }

  template <std::integral T>
  std::int64_t integer_of() {
    const T value = number<T>();
    if (!std::in_range<std::int64_t>(value)) fail("an integer does not fit in 63 bits");
    return static_cast<std::int64_t>(value);
  }

  std::int64_t integer(value_type type) {
    switch (type) {
      case value_type::uint8:
      case value_type::boolean: return integer_of<std::uint8_t>();
      case value_type::int8: return integer_of<std::int8_t>();
      case value_type::uint16: return integer_of<std::uint16_t>();
      case value_type::int16: return integer_of<std::int16_t>();
      case value_type::uint32: return integer_of<std::uint32_t>();
      case value_type::int32: return integer_of<std::int32_t>();
      case value_type::uint64: return integer_of<std::uint64_t>();
      case value_type::int64: return integer_of<std::int64_t>();
      default: fail("unknown metadata type " + std::to_string(static_cast<std::uint32_t>(type)));
    }
  }

  double floating(value_type type) {
    return type == value_type::float32 ? number<float>() : number<double>();
  }

  gguf_value array() {
    const auto type = number<value_type>();
    const auto count = number<std::uint64_t>();
    switch (type) {
      case value_type::float32:
      case value_type::float64: return elements<double>(count, [&] { return floating(type); });
      case value_type::string: return elements<std::string_view>(count, [&] { return string(); });
      default: return elements<std::int64_t>(count, [&] { return integer(type); });
    }
  }

  template <class T, std::invocable Read>
  std::vector<T> elements(std::uint64_t count, Read read) {
    std::vector<T> values;
    for (std::uint64_t i = 0; i < count; ++i) values.push_back(read());
    return values;
  }

  const std::string& path_;
  std::span<const std::byte> file_;
  std::size_t offset_ = 0;
};

}  // namespace smollm2
