// SPDX-License-Identifier: Apache-2.0
// Sorts the keys of a ranking on a device, with CUB.
#pragma once

#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>

#include "refreekv/cuda/block/key_segments.hpp"
#include "refreekv/cuda/device/kernel.cuh"

namespace refreekv::inline v0::cuda_detail {

/// Returns where segment i of an array begins, in keys.
struct segment_begin {
  index_t stride;
  __host__ __device__ int operator()(int i) const { return static_cast<int>(i * stride); }
};
/// Returns where segment i of an array ends, in keys.
struct segment_end {
  index_t stride;
  const index_t* lengths;
  __host__ __device__ int operator()(int i) const {
    return static_cast<int>(i * stride + lengths[i]);
  }
};

/// Returns how many segments one call of CUB sorts; its counts are ints.
[[nodiscard]] constexpr index_t segments_at_once(const key_segments& segments) noexcept {
  const index_t most = segments.capacity == 0 ? max_count : max_count / segments.capacity;
  return segments.count < most ? segments.count : most;
}

/// Whether to sort all segments as one array, which is faster for few long segments. Separately,
/// one block sorts a segment in six passes of 2 ns per key. As one array, the whole device needs
/// five or six passes of 8 ps per key, and 20 us for its launches. (model of an H100, not measured)
[[nodiscard]] constexpr bool sort_together(index_t count, index_t capacity) noexcept {
  return count > 0 && count <= 32 && capacity >= 16384 && capacity <= max_count / count;
}

/// Returns the bytes of temporary memory that sort_on_stream needs. CUB can report them, but asks
/// the device for that. If CUB ever needs more, it refuses the sort with an error. One array needs
/// counters, and 1 KB for each tile of at least 1,024 keys.
[[nodiscard]] constexpr std::size_t sort_bytes_of(const key_segments& segments) noexcept {
  const auto keys = static_cast<std::size_t>(segments.count * segments.capacity);
  return segments.together ? keys + (std::size_t{256} << 10) : 256;
}

/// sort_segments of key_segments.hpp. Neither allocates nor synchronises.
template <class Key>
[[nodiscard]] REFREEKV_HIDDEN cudaError_t sort_on_stream(cudaStream_t stream,
                                                         const key_segments& segments, Key*& keys,
                                                         Key*& spare, const index_t* lengths,
                                                         std::byte* temporary,
                                                         std::size_t bytes) noexcept {
  const index_t most = segments_at_once(segments);
  const thrust::counting_iterator<int> numbers(0);
  Key *from = keys, *to = spare;
  for (index_t first = 0; first < segments.count; first += most) {
    const index_t count = segments.count - first < most ? segments.count - first : most;
    const auto items = static_cast<int>(count * segments.capacity);
    cub::DoubleBuffer<Key> buffers(from + first * segments.capacity,
                                   to + first * segments.capacity);
    const cudaError_t error =
        segments.together
            ? cub::DeviceRadixSort::SortKeys(temporary, bytes, buffers, items, segments.first_bit(),
                                             segments.last_bit(), stream)
            : cub::DeviceSegmentedRadixSort::SortKeys(
                  temporary, bytes, buffers, items, static_cast<int>(count),
                  thrust::make_transform_iterator(numbers, segment_begin{segments.capacity}),
                  thrust::make_transform_iterator(numbers,
                                                  segment_end{segments.capacity, lengths + first}),
                  segments.first_bit(), segments.last_bit(), stream);
    if (error != cudaSuccess) return error;
    // All calls do the same number of passes, so all results are in the same array.
    keys = buffers.selector == 0 ? from : to;
    spare = buffers.selector == 0 ? to : from;
  }
  return cudaSuccess;
}

}  // namespace refreekv::inline v0::cuda_detail
