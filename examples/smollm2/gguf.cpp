// SPDX-License-Identifier: Apache-2.0
// Parses the header, the metadata and the tensor table of a GGUF file.
#include "gguf.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#include "gguf_cursor.hpp"

namespace smollm2 {
namespace {

// A row of the tensor table; the data section starts after the table, so it is placed later.
struct tensor_entry {
  gguf_tensor tensor;
  std::uint64_t offset;  // from the start of the data section
};

tensor_entry read_tensor_entry(gguf_cursor& in) {
  tensor_entry entry;
  entry.tensor.name = in.string();
  const auto rank = in.number<std::uint32_t>();
  if (rank > 4) in.fail("tensor '" + std::string(entry.tensor.name) + "' has too many axes");
  entry.tensor.shape.resize(rank);
  std::size_t elements = 1;
  // The file names the fastest axis first.
  for (std::size_t axis = rank; axis-- > 0;) {
    const auto extent = in.number<std::uint64_t>();
    if (extent == 0 || extent > std::numeric_limits<std::size_t>::max() / elements) {
      in.fail("tensor '" + std::string(entry.tensor.name) + "' has an impossible shape");
    }
    elements *= extent;
    entry.tensor.shape[axis] = extent;
  }
  entry.tensor.type = in.number<tensor_type>();
  entry.offset = in.number<std::uint64_t>();
  return entry;
}

void place_tensor(tensor_entry& entry, std::span<const std::byte> data, const gguf_cursor& in) {
  gguf_tensor& tensor = entry.tensor;
  const tensor_block block = block_of(tensor.type);
  if (block.bytes == 0) {
    in.fail_unreadable("tensor '" + std::string(tensor.name) + "' is of type " +
                       name_of(tensor.type));
  }
  const std::size_t row = tensor.shape.empty() ? 1 : tensor.shape.back();
  if (row % block.elements != 0) {
    in.fail("tensor '" + std::string(tensor.name) + "' has rows of broken blocks");
  }
  const std::size_t blocks = tensor.elements() / block.elements;
  if (entry.offset > data.size()) in.fail_truncated();
  const std::size_t available = data.size() - entry.offset;
  if (blocks > available / block.bytes) in.fail_truncated();
  tensor.data = data.subspan(entry.offset, blocks * block.bytes);
}

}  // namespace

std::size_t gguf_tensor::elements() const {
  return std::accumulate(shape.begin(), shape.end(), std::size_t{1}, std::multiplies{});
}

gguf_file::gguf_file(const std::filesystem::path& path)
    : path_(path.string()), pages_(map_file(path)) {
  const std::span<const std::byte> file = pages_.bytes();
  if (file.size() < 4 || std::memcmp(file.data(), "GGUF", 4) != 0) {
    throw std::runtime_error(path_ + " is not a GGUF file");
  }
  gguf_cursor in(path_, file);
  in.number<std::uint32_t>();  // the magic just checked
  const auto version = in.number<std::uint32_t>();
  if (version != 2 && version != 3) {
    throw std::runtime_error(path_ + " is of GGUF version " + std::to_string(version) +
                             "; this example reads versions 2 and 3");
  }
  const auto tensor_count = in.number<std::uint64_t>();
  const auto metadata_count = in.number<std::uint64_t>();

  for (std::uint64_t i = 0; i < metadata_count; ++i) {
    const std::string_view key = in.string();
    if (!metadata_.emplace(key, in.value()).second) {
      in.fail("metadata '" + std::string(key) + "' comes twice");
    }
  }

  std::vector<tensor_entry> entries;
  for (std::uint64_t i = 0; i < tensor_count; ++i) entries.push_back(read_tensor_entry(in));

  const auto alignment = has("general.alignment") ? get<std::int64_t>("general.alignment") : 32;
  if (alignment <= 0 || !std::has_single_bit(static_cast<std::uint64_t>(alignment))) {
    in.fail("the alignment is not a power of two");
  }
  const auto step = static_cast<std::size_t>(alignment);
  const std::size_t data_begin = (in.offset() + step - 1) / step * step;
  const auto data = file.subspan(std::min(data_begin, file.size()));

  for (tensor_entry& entry : entries) {
    place_tensor(entry, data, in);
    if (!tensor_index_.emplace(entry.tensor.name, tensors_.size()).second) {
      in.fail("tensor '" + std::string(entry.tensor.name) + "' comes twice");
    }
    tensors_.push_back(std::move(entry.tensor));
  }
}

const gguf_value& gguf_file::find(std::string_view key) const {
  const auto entry = metadata_.find(key);
  if (entry == metadata_.end()) {
    throw std::runtime_error(path_ + " has no metadata '" + std::string(key) + "'");
  }
  return entry->second;
}

const gguf_tensor& gguf_file::tensor(std::string_view name) const {
  const auto entry = tensor_index_.find(name);
  if (entry == tensor_index_.end()) {
    throw std::runtime_error(path_ + " has no tensor '" + std::string(name) + "'");
  }
  return tensors_[entry->second];
}

}  // namespace smollm2
