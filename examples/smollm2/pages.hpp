// SPDX-License-Identifier: Apache-2.0
// Owns memory pages mapped from the operating system, which gets them back at once on destruction.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace smollm2 {

class pages {
 public:
  pages() = default;
  pages(pages&& other) noexcept;
  pages& operator=(pages&& other) noexcept;
  pages(const pages&) = delete;
  pages& operator=(const pages&) = delete;
  ~pages();

  std::span<std::byte> bytes() const { return bytes_; }

  // Takes a part of a mapped file out of memory; reading it again fetches it from the file.
  static void evict(std::span<const std::byte> part);

  friend pages map_file(const std::filesystem::path& path);
  friend pages map_zeroed(std::size_t bytes);

 private:
  explicit pages(std::span<std::byte> bytes) : bytes_(bytes) {}

  std::span<std::byte> bytes_;
};

// The whole file; the pages may only be read. Throws std::runtime_error where it cannot be opened.
pages map_file(const std::filesystem::path& path);

// Zeros that take no memory before they are written. The size is rounded up to whole pages.
pages map_zeroed(std::size_t bytes);

}  // namespace smollm2
