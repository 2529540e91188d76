// SPDX-License-Identifier: Apache-2.0
// A source in one strided tensor: the keys or the values of one layer.
#pragma once

#include "refreekv/cache/source.hpp"

namespace refreekv::inline v0 {

/// A cache in one strided tensor.
template <class T, class Memory = host_memory>
class dense {
 public:
  using element_type = T;
  using memory = Memory;

  /// rows: [sequence, kv_head, token, head_dim], axes in any order in memory. lengths: [sequence],
  /// in tokens; optional.
  constexpr explicit dense(view<T, 4, Memory> rows, lengths_view<Memory> lengths = {}) noexcept
      : rows_(rows), lengths_(lengths) {}
  template <class Length>
    requires(!std::is_same_v<std::remove_const_t<Length>, position_t>)
  constexpr dense(view<T, 4, Memory>, view<Length, 1, Memory>) noexcept {
    static_assert(sizeof(Length) == 0, "lengths are int32 (position_t): convert those of 64 bits");
  }

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr cache_shape shape() const noexcept {
    return {rows_.extent(0), rows_.extent(1), rows_.extent(2), rows_.extent(3)};
  }

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t tokens(index_t sequence) const noexcept {
    return length_of(lengths_, sequence, rows_.extent(2));
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr token_run<T> run_at(index_t sequence,
                                                                   index_t kv_head,
                                                                   index_t token) const noexcept {
    return {rows_.at(sequence, kv_head, token), tokens(sequence) - token, rows_.stride(2),
            rows_.stride(3)};
  }
  /// The first row of the tensor. Needs no lengths or tables, which may be in device memory.
  [[nodiscard]] constexpr token_run<T> first_slot_row() const noexcept {
    return {rows_.data(), 0, rows_.stride(2), rows_.stride(3)};
  }
  /// Whether all KV heads are the same memory.
  [[nodiscard]] constexpr bool repeats_heads() const noexcept {
    return rows_.extent(1) > 1 && rows_.stride(1) == 0;
  }
  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (rows_.malformed()) return "dense rows need a pointer and extents >= 0";
    return invalid_lengths(lengths_, rows_.extent(0), rows_.extent(2));
  }

 private:
  view<T, 4, Memory> rows_;
  lengths_view<Memory> lengths_;
};

}  // namespace refreekv::inline v0
