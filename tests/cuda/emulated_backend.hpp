// SPDX-License-Identifier: Apache-2.0
// A backend that runs kernel bodies on the CPU, in emulated blocks.
#pragma once

#include <cstddef>

#include "eigen_elements.hpp"
#include "emulated_block.hpp"
#include "refreekv/core/status.hpp"
#include "refreekv/cuda/ops.hpp"

namespace emulation {

/// Blocks and their threads run in order with order_seed 0, else in an order that it seeds.
struct emulated_backend {
  unsigned order_seed = 0;
};

/// One engine per host thread, for all bodies, because each engine owns stacks.
inline engine& thread_engine() {
  static thread_local engine blocks;
  return blocks;
}

/// Runs the body for each item in [0, items). Throws std::logic_error if the body breaks a rule of
/// blocks. Within the library, which is noexcept, this ends the program with the message.
template <refreekv::cuda_detail::kernel_body Body>
refreekv::status run_blocks(const emulated_backend& exec, index_t items, const Body& body) {
  thread_engine().run(body, items, exec.order_seed);
  return refreekv::status::ok;
}

// The functions that replace CUB.

/// Chooses either way by the seed, not by the sizes, so that tests run both.
inline bool sorts_together(const emulated_backend& exec, index_t /*count*/, index_t /*capacity*/) {
  return exec.order_seed % 2 == 1;
}

inline std::size_t sort_bytes(const emulated_backend&, const refreekv::cuda_detail::key_segments&) {
  return 1;
}

/// Writes the sorted keys to `spare`, swaps both pointers, and overwrites the input with garbage.
inline refreekv::status sort_segments(const emulated_backend& exec,
                                      const refreekv::cuda_detail::key_segments& segments,
                                      std::uint64_t*& keys, std::uint64_t*& spare,
                                      const index_t* lengths, std::byte* temporary,
                                      std::size_t bytes) {
  if (bytes < sort_bytes(exec, segments)) return refreekv::status::device_error;
  std::memset(temporary, garbage, bytes);
  const std::uint64_t sorted_bits =
      (segments.last_bit() < 64 ? 1ull << segments.last_bit() : 0) - (1ull << segments.first_bit());
  const auto sort = [&](index_t first, index_t count) {
    std::uint64_t *const from = keys + first, *const to = spare + first;
    std::stable_sort(to, std::copy(from, from + count, to), [&](std::uint64_t a, std::uint64_t b) {
      return (a & sorted_bits) < (b & sorted_bits);
    });
    std::memset(from, garbage, static_cast<std::size_t>(count) * sizeof *from);
  };
  if (segments.together) {
    sort(0, segments.count * segments.capacity);
  } else {
    for (index_t i = 0; i < segments.count; ++i) sort(i * segments.capacity, lengths[i]);
  }
  std::swap(keys, spare);
  return refreekv::status::ok;
}

}  // namespace emulation

template <>
struct refreekv::ops<emulation::emulated_backend>
    : refreekv::cuda_detail::device_ops<emulation::emulated_backend, refreekv::host_memory> {};
