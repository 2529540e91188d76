// SPDX-License-Identifier: Apache-2.0
// One block of memory that `operator new` divides: the heap of a program whose device has to reach
// all that its tests allocate.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>

/// Blocks of powers of two, aligned to their size up to a page's. What is given back is taken again
/// for a block of the same size; nothing is merged.
class arena {
 public:
  static constexpr std::size_t page = 4096;

  /// Takes over [memory, memory + bytes), whole pages and aligned to one.
  void begin(std::byte* memory, std::size_t bytes) noexcept {
    class_of_page_ = reinterpret_cast<std::uint8_t*>(memory);
    memory_ = memory;
    next_ = memory + (bytes / page + page - 1) / page * page;
    end_ = memory + bytes;
  }
  /// No block is touched from now on: what is left is destroyed after the memory may be gone.
  void close() noexcept { closed_ = true; }

  bool open() const noexcept { return memory_ != nullptr && !closed_; }
  bool holds(const void* p) const noexcept {
    const auto* const at = static_cast<const std::byte*>(p);
    return at >= memory_ && at < end_;
  }
  /// How much of it was ever divided.
  std::size_t peak() const noexcept { return static_cast<std::size_t>(next_ - memory_); }

  /// Null where there is no room.
  void* take(std::size_t bytes) noexcept {
    const auto size_class =
        static_cast<std::size_t>(std::bit_width((bytes > least ? bytes : least) - 1));
    if (size_class >= classes) return nullptr;
    const std::lock_guard alone(lock_);
    if (free_[size_class] == nullptr) divide(size_class);
    node* const block = free_[size_class];
    if (block != nullptr) free_[size_class] = block->next;
    return block;
  }
  /// Takes back what take returned.
  void give(void* block) noexcept {
    if (closed_) return;
    const std::lock_guard alone(lock_);
    const std::size_t size_class = class_of_page_[page_of(block)];
    free_[size_class] = new (block) node{free_[size_class]};
  }

 private:
  struct node {
    node* next;
  };
  static constexpr std::size_t least = 16;
  static constexpr std::size_t classes = 40;

  std::size_t page_of(const void* p) const noexcept {
    return static_cast<std::size_t>(static_cast<const std::byte*>(p) - memory_) / page;
  }

  /// Makes a page's worth of blocks, or one larger block.
  void divide(std::size_t size_class) noexcept {
    const std::size_t block = std::size_t{1} << size_class, bytes = block < page ? page : block;
    if (bytes > static_cast<std::size_t>(end_ - next_)) return;
    class_of_page_[page_of(next_)] = static_cast<std::uint8_t>(size_class);
    for (std::size_t i = 0; i < bytes; i += block) {
      free_[size_class] = new (next_ + i) node{free_[size_class]};
    }
    next_ += bytes;
  }

  std::mutex lock_;
  std::byte *memory_ = nullptr, *next_ = nullptr, *end_ = nullptr;
  std::uint8_t* class_of_page_ = nullptr;  // [page]: log2 of its blocks' size
  std::array<node*, classes> free_{};
  bool closed_ = false;
};
