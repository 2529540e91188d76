// SPDX-License-Identifier: Apache-2.0
// A backend whose kernel bodies run on the CPU, by emulated blocks.
#pragma once

#include <cstddef>

#include "eigen_elements.hpp"
#include "emulated_block.hpp"
#include "refreekv/cuda/ops.hpp"
#include "refreekv/status.hpp"

namespace emulation {

/// Blocks and their threads in order, or, where order_seed is not 0, in one that it decides.
struct emulated_backend {
  unsigned order_seed = 0;
};

/// One for all bodies: each has stacks of its own.
inline engine& thread_engine() {
  static thread_local engine blocks;
  return blocks;
}

/// Runs the body for each item in [0, items). Throws std::logic_error where it breaks a rule of
/// blocks; within the library, which does not throw, that ends the program and says why.
template <refreekv::cuda_detail::kernel_body Body>
refreekv::status run_blocks(const emulated_backend& on, index_t items, const Body& body) {
  thread_engine().run(body, items, on.order_seed);
  return refreekv::status::ok;
}

// In CUB's place.

/// Bytes that sort_segments needs.
inline std::size_t sort_bytes(const emulated_backend&, index_t /*segments*/,
                              index_t /*segment_stride*/) {
  return 1;
}

/// Writes the first lengths[i] of each segment's keys to `sorted`, in ascending order.
inline refreekv::status sort_segments(const emulated_backend& on, std::uint64_t* keys,
                                      std::uint64_t* sorted, index_t segments,
                                      index_t segment_stride, const index_t* lengths,
                                      std::byte* temporary, std::size_t temporary_bytes) {
  if (temporary_bytes < sort_bytes(on, segments, segment_stride)) {
    return refreekv::status::device_error;
  }
  std::memset(temporary, garbage, temporary_bytes);
  for (index_t i = 0; i < segments; ++i) {
    const std::uint64_t* const from = keys + i * segment_stride;
    std::uint64_t* const to = sorted + i * segment_stride;
    std::sort(to, std::copy(from, from + lengths[i], to));
  }
  return refreekv::status::ok;
}

}  // namespace emulation

template <>
struct refreekv::ops<emulation::emulated_backend>
    : refreekv::cuda_detail::device_ops<emulation::emulated_backend, refreekv::host_memory> {};
