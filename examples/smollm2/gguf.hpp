// SPDX-License-Identifier: Apache-2.0
// Reads a GGUF model file (versions 2 and 3) in place: typed metadata and a table of tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "pages.hpp"
#include "tensor_type.hpp"

namespace smollm2 {

// Integers of every width are held as std::int64_t, floats as double, booleans in arrays as 0 or 1.
using gguf_value =
    std::variant<bool, std::int64_t, double, std::string_view, std::vector<std::int64_t>,
                 std::vector<double>, std::vector<std::string_view>>;

struct gguf_tensor {
  std::string_view name;
  std::vector<std::size_t> shape;  // C order, the fastest axis last: a projection is [out, in]
  tensor_type type;
  std::span<const std::byte> data;

  std::size_t elements() const;
};

// Everything handed out points into the mapped file and lives as long as this object.
class gguf_file {
 public:
  // Every size and offset is checked against the file here, so that no later read can leave it.
  // Throws std::runtime_error, also on a damaged file and on tensors that it cannot dequantise.
  explicit gguf_file(const std::filesystem::path& path);

  const std::string& path() const { return path_; }
  bool has(std::string_view key) const { return metadata_.contains(key); }

  // The value of a metadata key; throws where it is missing or not a T of gguf_value.
  template <class T>
  const T& get(std::string_view key) const {
    const T* value = std::get_if<T>(&find(key));
    if (value == nullptr) {
      throw std::runtime_error(path_ + " holds metadata '" + std::string(key) +
                               "' of an unexpected type");
    }
    return *value;
  }

  std::span<const gguf_tensor> tensors() const { return tensors_; }
  bool has_tensor(std::string_view name) const { return tensor_index_.contains(name); }
  const gguf_tensor& tensor(std::string_view name) const;

 private:
  const gguf_value& find(std::string_view key) const;

  std::string path_;
  pages pages_;
  std::map<std::string_view, gguf_value> metadata_;
  std::vector<gguf_tensor> tensors_;
  std::map<std::string_view, std::size_t> tensor_index_;  // name -> index in tensors_
};

}  // namespace smollm2
