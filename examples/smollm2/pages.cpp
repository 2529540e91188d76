// SPDX-License-Identifier: Apache-2.0
// Maps files and anonymous memory with mmap.
#include "pages.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <utility>

namespace smollm2 {
namespace {

class file_descriptor {
 public:
  explicit file_descriptor(const std::filesystem::path& path)
      : value(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  file_descriptor(const file_descriptor&) = delete;
  file_descriptor& operator=(const file_descriptor&) = delete;
  ~file_descriptor() {
    if (value >= 0) ::close(value);
  }

  const int value;
};

std::size_t page_size() { return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)); }

}  // namespace

pages::pages(pages&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

pages& pages::operator=(pages&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

pages::~pages() {
  if (!bytes_.empty()) ::munmap(bytes_.data(), bytes_.size());
}

void pages::evict(std::span<const std::byte> part) {
  // A page at the edge may hold a neighbour's bytes too, which costs at most one more fetch.
  const auto begin = reinterpret_cast<std::uintptr_t>(part.data()) / page_size() * page_size();
  const auto end = reinterpret_cast<std::uintptr_t>(part.data() + part.size());
  ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

pages map_file(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) throw std::runtime_error("no such file: " + path.string());
  const file_descriptor file(path);
  struct stat status {};
  if (file.value < 0 || ::fstat(file.value, &status) != 0 || !S_ISREG(status.st_mode)) {
    throw std::runtime_error("cannot read " + path.string());
  }
  const auto size = static_cast<std::size_t>(status.st_size);
  if (size == 0) return pages();
  void* address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.value, 0);
  if (address == MAP_FAILED) throw std::runtime_error("cannot map " + path.string());
  return pages({static_cast<std::byte*>(address), size});
}

pages map_zeroed(std::size_t bytes) {
  if (bytes == 0) return pages();
  const std::size_t size = (bytes + page_size() - 1) / page_size() * page_size();
  void* address = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) throw std::bad_alloc();
  return pages({static_cast<std::byte*>(address), size});
}

}  // namespace smollm2
