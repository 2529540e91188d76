// SPDX-License-Identifier: Apache-2.0
// view<T, Rank, Memory>: a strided tensor that does not own its elements.
#pragma once

#include <cstddef>
#include <type_traits>

#include "refreekv/core/config.hpp"

namespace refreekv::inline v0 {

/// Tags for the memory that holds the elements of a view. They are part of its type, so mixing the
/// two does not compile.
struct host_memory {};
struct device_memory {};

/// A non-owning tensor: a pointer, extents and strides, the latter two in elements. The strides
/// define the layout, so any axis order, padding or broadcast (stride 0) is a view. Copying a view
/// copies no elements.
template <class T, std::size_t Rank, class Memory = host_memory>
class view {
 public:
  using element_type = T;
  using memory = Memory;

  /// An empty view: data() is null and every extent is 0.
  constexpr view() noexcept = default;

  /// A contiguous tensor, last axis fastest.
  template <std::size_t N>
    requires(N == Rank)
  constexpr view(T* data, const index_t (&extents)[N]) noexcept : data_(data) {
    std::uint64_t stride = 1;  // wraps for extents that no memory holds: never indexed
    for (std::size_t axis = Rank; axis-- > 0;) {
      extents_[axis] = extents[axis];
      strides_[axis] = static_cast<index_t>(stride);
      stride *= static_cast<std::uint64_t>(extents[axis]);
    }
  }

  /// A tensor of any strides, in elements.
  template <std::size_t N, std::size_t M>
    requires(N == Rank && M == Rank)
  constexpr view(T* data, const index_t (&extents)[N], const index_t (&strides)[M]) noexcept
      : data_(data) {
    for (std::size_t axis = 0; axis < Rank; ++axis) {
      extents_[axis] = extents[axis];
      strides_[axis] = strides[axis];
    }
  }

  /// Converts a mutable view to a const one.
  template <class U>
    requires(std::is_same_v<const U, T>)
  REFREEKV_HOST_DEVICE constexpr view(const view<U, Rank, Memory>& other) noexcept
      : data_(other.data()) {
    for (std::size_t axis = 0; axis < Rank; ++axis) {
      extents_[axis] = other.extent(axis);
      strides_[axis] = other.stride(axis);
    }
  }

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr T* data() const noexcept { return data_; }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t extent(std::size_t axis) const noexcept {
    return extents_[axis];
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t stride(std::size_t axis) const noexcept {
    return strides_[axis];
  }

  /// Address of the element at the given leading indices. Missing trailing indices are 0.
  template <class... Index>
    requires(sizeof...(Index) <= Rank)
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr T* at(Index... index) const noexcept {
    index_t offset = 0;
    std::size_t axis = 0;
    ((offset += static_cast<index_t>(index) * strides_[axis++]), ...);
    return data_ + offset;
  }

  template <class... Index>
    requires(sizeof...(Index) == Rank)
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr T& operator()(Index... index) const noexcept {
    return *at(index...);
  }

  /// Whether an extent is negative, or the view has elements but no pointer.
  [[nodiscard]] constexpr bool malformed() const noexcept {
    index_t elements = 1;
    for (const index_t extent : extents_) {
      if (extent < 0) return true;
      elements = extent == 0 ? 0 : elements;
    }
    return elements != 0 && data_ == nullptr;
  }

 private:
  T* data_ = nullptr;
  index_t extents_[Rank] = {};  // not std::array: its members are not device functions
  index_t strides_[Rank] = {};
};

template <class T, std::size_t N>
view(T*, const index_t (&)[N]) -> view<T, N>;
template <class T, std::size_t N, std::size_t M>
view(T*, const index_t (&)[N], const index_t (&)[M]) -> view<T, N>;

}  // namespace refreekv::inline v0
