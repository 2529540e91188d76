// SPDX-License-Identifier: Apache-2.0
// The limit that everything is measured against: every byte of the keys is read once.
#pragma once

#include <cstring>

#include "refreekv/cpu/executor.hpp"

namespace bench {

/// Sums the 8-byte words of `bytes` bytes (a multiple of 64) with the executor's workers.
template <class Executor>
std::uint64_t read_keys(Executor& on, const std::byte* data, std::size_t bytes) {
  std::atomic<std::uint64_t> total{0};
  on.run([&](int w) {
    const std::size_t lines = bytes / 64, workers = static_cast<std::size_t>(on.workers());
    const auto worker = static_cast<std::size_t>(w);
    std::uint64_t sums[8] = {};  // independent, so that loads do not wait for additions
    for (std::size_t i = lines * worker / workers; i < lines * (worker + 1) / workers; ++i) {
      std::uint64_t line[8];
      std::memcpy(line, data + 64 * i, sizeof line);
      for (int j = 0; j < 8; ++j) sums[j] += line[j];
    }
    for (const std::uint64_t sum : sums) total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total;
}

}  // namespace bench
