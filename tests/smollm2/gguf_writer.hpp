// SPDX-License-Identifier: Apache-2.0
// Writes small GGUF files for the tests to read.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace smollm2_test {

class byte_stream {
 public:
  template <class T>
  byte_stream& number(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }

  byte_stream& raw(std::string_view text) {
    bytes_ += text;
    return *this;
  }

  byte_stream& string(std::string_view text) {
    return number(std::uint64_t{text.size()}).raw(text);
  }

  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

class gguf_writer {
 public:
  static constexpr std::uint32_t u32 = 4, i32 = 5, f32 = 6, boolean = 7, text = 8, array = 9;

  gguf_writer& add(std::string_view key, std::uint32_t value) {
    return begin(key, u32, [&](byte_stream& out) { out.number(value); });
  }
  gguf_writer& add(std::string_view key, float value) {
    return begin(key, f32, [&](byte_stream& out) { out.number(value); });
  }
  gguf_writer& add(std::string_view key, bool value) {
    return begin(key, boolean, [&](byte_stream& out) { out.number(std::uint8_t{value}); });
  }
  gguf_writer& add(std::string_view key, std::string_view value) {
    return begin(key, text, [&](byte_stream& out) { out.string(value); });
  }
  gguf_writer& add(std::string_view key, const char* value) {
    return add(key, std::string_view(value));
  }
  gguf_writer& add(std::string_view key, const std::vector<std::int32_t>& values) {
    return begin(key, array, [&](byte_stream& out) {
      out.number(i32).number(std::uint64_t{values.size()});
      for (const std::int32_t value : values) out.number(value);
    });
  }
  gguf_writer& add(std::string_view key, const std::vector<float>& values) {
    return begin(key, array, [&](byte_stream& out) {
      out.number(f32).number(std::uint64_t{values.size()});
      for (const float value : values) out.number(value);
    });
  }
  gguf_writer& add(std::string_view key, const std::vector<std::string>& values) {
    return begin(key, array, [&](byte_stream& out) {
      out.number(text).number(std::uint64_t{values.size()});
      for (const std::string& value : values) out.string(value);
    });
  }

  // Shape in C order, as the reader hands it out.
  gguf_writer& add_tensor(std::string_view name, const std::vector<std::uint64_t>& shape,
                          std::uint32_t type, std::string_view data) {
    tensors_.string(name).number(static_cast<std::uint32_t>(shape.size()));
    for (auto extent = shape.rbegin(); extent != shape.rend(); ++extent) tensors_.number(*extent);
    data_.resize((data_.size() + 31) / 32 * 32);
    tensors_.number(type).number(std::uint64_t{data_.size()});
    data_ += data;
    ++tensor_count_;
    return *this;
  }

  gguf_writer& add_tensor(std::string_view name, const std::vector<std::uint64_t>& shape,
                          std::span<const float> values) {
    return add_tensor(name, shape, 0,
                      {reinterpret_cast<const char*>(values.data()), values.size_bytes()});
  }

  std::string bytes(std::uint32_t version = 3) const {
    byte_stream out;
    out.raw("GGUF").number(version).number(tensor_count_).number(metadata_count_);
    out.raw(metadata_.bytes()).raw(tensors_.bytes());
    std::string bytes = out.bytes();
    if (tensor_count_ > 0) bytes.resize((bytes.size() + 31) / 32 * 32);
    return bytes + data_;
  }

 private:
  template <class Write>
  gguf_writer& begin(std::string_view key, std::uint32_t type, Write write) {
    metadata_.string(key).number(type);
    write(metadata_);
    ++metadata_count_;
    return *this;
  }

  byte_stream metadata_;
  byte_stream tensors_;
  std::string data_;
  std::uint64_t metadata_count_ = 0;
  std::uint64_t tensor_count_ = 0;
};

// A file of these bytes, for as long as the object lives.
class temporary_file {
 public:
  explicit temporary_file(std::string_view bytes) {
    static int serial = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("smollm2_test_" + std::to_string(::getpid()) + "_" + std::to_string(serial++));
    std::ofstream(path_, std::ios::binary) << bytes;
  }
  temporary_file(const temporary_file&) = delete;
  temporary_file& operator=(const temporary_file&) = delete;
  ~temporary_file() { std::filesystem::remove(path_); }

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace smollm2_test
