// SPDX-License-Identifier: Apache-2.0
// The limits that everything is measured against: reading every byte of the keys once, and doing
// as many multiply-adds as a decision needs.
#pragma once

#include <cstddef>
#include <cstring>
#include <span>

#include "refreekv/cpu/executor.hpp"
#include "refreekv/cpu/simd/lanes.hpp"

namespace bench {

using refreekv::index_t;

/// Adds up the bytes of `lines` cache lines in four registers.
inline std::uint64_t sum_lines(const std::byte* data, std::size_t lines) {
  std::uint64_t sums[4][8] = {};
  const auto add = [&](std::uint64_t(&sum)[8], std::size_t line) {
    std::uint64_t words[8];
    std::memcpy(words, data + 64 * line, sizeof words);
    for (int j = 0; j < 8; ++j) sum[j] += words[j];
  };
  std::size_t i = 0;
  for (; i + 4 <= lines; i += 4) {
    for (std::size_t k = 0; k < 4; ++k) add(sums[k], i + k);
  }
  for (; i < lines; ++i) add(sums[0], i);
  std::uint64_t total = 0;
  for (const auto& sum : sums) {
    for (const std::uint64_t word : sum) total += word;
  }
  return total;
}

/// Reads whole cache lines of the keys, a part for each of the executor's workers.
template <class Executor>
std::uint64_t read_keys(const Executor& threads, std::span<const std::byte> keys) {
  std::atomic<std::uint64_t> total{0};
  refreekv::for_each_range(
      threads, static_cast<index_t>(keys.size() / 64), [&](int, index_t begin, index_t end) {
        total += sum_lines(keys.data() + 64 * begin, static_cast<std::size_t>(end - begin));
      });
  return total;
}

/// `count` multiply-adds of floats between registers, divided among the executor's workers.
template <class Executor>
float fma_peak(const Executor& threads, index_t count) {
  using namespace refreekv::cpu_detail;
  constexpr index_t chains = 12;  // enough for the latency, few enough for 16 registers
  std::atomic<float> total{0};
  refreekv::for_each_range(threads, count / (chains * lane_count),
                           [&](int, index_t begin, index_t end) {
                             lanes sums[chains], x = splat(1.5f), all = splat(0);
                             const lanes y = splat(1e-9f);
#pragma GCC unroll 12
                             for (int c = 0; c < chains; ++c)
                               sums[c] = splat(static_cast<float>(c + 1));
                             for (index_t i = begin; i < end; ++i) {
                               keep(x);  // or x * y would be known
#pragma GCC unroll 12
                               for (int c = 0; c < chains; ++c) sums[c] += x * y;
                             }
#pragma GCC unroll 12
                             for (int c = 0; c < chains; ++c) all += sums[c];
                             total = sum_of(all);
                           });
  return total;
}

}  // namespace bench
