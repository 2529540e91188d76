// SPDX-License-Identifier: Apache-2.0
// The memory that a caller provides for one call, and the arena that sizes it or carves it.
#pragma once

#include <cstddef>
#include <span>

#include "refreekv/core/view.hpp"

namespace refreekv::inline v0 {

/// The caller's bytes for one call. Requires no alignment; the contents are undefined before and
/// after the call. Two calls may share a workspace unless they run at the same time.
template <class Memory = host_memory>
struct workspace {
  std::byte* data = nullptr;
  std::size_t bytes = 0;

  constexpr workspace() noexcept = default;
  constexpr workspace(std::byte* first, std::size_t size) noexcept : data(first), bytes(size) {}
  /// On the host anything that converts to a span of bytes is a workspace, such as a vector or an
  /// array.
  template <class Bytes>
    requires(std::is_same_v<Memory, host_memory> &&
             std::is_convertible_v<Bytes&, std::span<std::byte>> &&
             !std::is_same_v<std::remove_cvref_t<Bytes>, workspace>)
  constexpr workspace(Bytes&& range) noexcept {
    const std::span<std::byte> span(range);
    data = span.data();
    bytes = span.size();
  }
};

/// Carves arrays out of a workspace, each on a cache line of its own (64 bytes). Without memory it
/// only counts their bytes. So one function that asks an arena for arrays both sizes a workspace
/// and carves it.
class arena {
 public:
  static constexpr std::size_t alignment = 64;

  /// An arena that counts.
  constexpr arena() noexcept = default;

  /// An arena that carves. Requires `data` to hold the bytes() that counting found.
  explicit arena(std::byte* data) noexcept {
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    next_ = data + (alignment - address % alignment) % alignment;
  }

  /// Returns an uninitialised array of T whose number of elements is the product of `extents`; null
  /// while counting. A size that no memory can hold counts as the largest possible size. Requires
  /// extents >= 0.
  template <class T, class... Extents>
  [[nodiscard]] T* array(Extents... extents) noexcept {
    static_assert(alignof(T) <= alignment && std::is_trivially_destructible_v<T>);
    std::size_t bytes = sizeof(T);
    ((bytes = product(bytes, static_cast<std::uint64_t>(extents))), ...);
    bytes = bytes < most ? (bytes + alignment - 1) / alignment * alignment : most;
    taken_ = bytes < most - taken_ ? taken_ + bytes : most;
    if (next_ == nullptr) return nullptr;
    T* array = static_cast<T*>(static_cast<void*>(next_));
    next_ += bytes;
    return array;
  }

  /// Bytes that suffice for all arrays so far, at any start address of the workspace.
  [[nodiscard]] constexpr std::size_t bytes() const noexcept {
    return taken_ == 0 ? 0 : taken_ + alignment - 1;
  }

 private:
  static constexpr std::size_t most = static_cast<std::size_t>(-1) - alignment + 1;

  // Extents have 64 bits even where std::size_t has 32.
  static constexpr std::size_t product(std::size_t a, std::uint64_t b) noexcept {
    return b != 0 && a > most / b ? most : static_cast<std::size_t>(a * b);
  }

  std::byte* next_ = nullptr;
  std::size_t taken_ = 0;
};

}  // namespace refreekv::inline v0
