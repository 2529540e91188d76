// SPDX-License-Identifier: Apache-2.0
// Sorting the segments of an array on a device, by CUB.
#pragma once

#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cub/device/device_segmented_radix_sort.cuh>

#include "refreekv/config.hpp"
#include "refreekv/status.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Where segment i of an array begins.
struct segment_begin {
  index_t stride;
  __host__ __device__ int operator()(int i) const { return static_cast<int>(i * stride); }
};
/// Where it ends.
struct segment_end {
  index_t stride;
  const index_t* lengths;
  __host__ __device__ int operator()(int i) const {
    return static_cast<int>(i * stride + lengths[i]);
  }
};

/// The segments that CUB, whose counts are ints, sorts in one call.
[[nodiscard]] constexpr index_t segments_at_once(index_t segments,
                                                 index_t segment_stride) noexcept {
  const index_t most = segment_stride == 0 ? max_count : max_count / segment_stride;
  return segments < most ? segments : most;
}

inline cudaError_t sort_some(std::byte* temporary, std::size_t& bytes, const std::uint64_t* keys,
                             std::uint64_t* sorted, index_t segments, index_t segment_stride,
                             const index_t* lengths, cudaStream_t stream) noexcept {
  const thrust::counting_iterator<int> numbers(0);
  return cub::DeviceSegmentedRadixSort::SortKeys(
      temporary, bytes, keys, sorted, static_cast<int>(segments * segment_stride),
      static_cast<int>(segments),
      thrust::make_transform_iterator(numbers, segment_begin{segment_stride}),
      thrust::make_transform_iterator(numbers, segment_end{segment_stride, lengths}), 0, 64,
      stream);
}

/// Bytes that sort_on_stream needs. Asks the current device.
[[nodiscard]] inline std::size_t sort_bytes_of(index_t segments, index_t segment_stride) noexcept {
  std::size_t bytes = 0;
  const index_t most = segments_at_once(segments, segment_stride);
  if (sort_some(nullptr, bytes, nullptr, nullptr, most, segment_stride, nullptr, nullptr) !=
      cudaSuccess) {
    (void)cudaGetLastError();  // the sort will be refused, and say so
  }
  return bytes;
}

/// Writes sorted[i * segment_stride ..]: keys[i * segment_stride ..] of lengths[i], ascending.
/// Neither allocates nor synchronises. Requires temporary_bytes of sort_bytes_of.
[[nodiscard]] inline status sort_on_stream(cudaStream_t stream, const std::uint64_t* keys,
                                           std::uint64_t* sorted, index_t segments,
                                           index_t segment_stride, const index_t* lengths,
                                           std::byte* temporary,
                                           std::size_t temporary_bytes) noexcept {
  const index_t most = segments_at_once(segments, segment_stride);
  for (index_t first = 0; first < segments; first += most) {
    const index_t count = segments - first < most ? segments - first : most;
    const index_t offset = first * segment_stride;
    if (sort_some(temporary, temporary_bytes, keys + offset, sorted + offset, count, segment_stride,
                  lengths + first, stream) != cudaSuccess) {
      return status::device_error;
    }
  }
  return status::ok;
}

}  // namespace refreekv::inline v0::cuda_detail
