// SPDX-License-Identifier: Apache-2.0
// Times of several works in alternating runs, so that a noisy machine slows all of them alike.
#pragma once

#include <benchmark/benchmark.h>

#include <array>
#include <chrono>

#include "median.hpp"

namespace bench {

/// Runs all works in turn, `before` before each; returns their median times in seconds. The first
/// one's is the benchmark's.
template <class Before, class... Works>
std::array<double, sizeof...(Works)> alternate(benchmark::State& state, const Before& before,
                                               const Works&... works) {
  std::array<std::vector<double>, sizeof...(Works)> times;
  const auto time = [&](const auto& work, std::vector<double>& into) {
    before();
    const auto start = std::chrono::steady_clock::now();
    work();
    into.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  };
  for (auto _ : state) {
    std::size_t i = 0;
    (time(works, times[i++]), ...);
    benchmark::ClobberMemory();
    state.SetIterationTime(times[0].back());
  }
  std::array<double, sizeof...(Works)> medians;
  std::transform(times.begin(), times.end(), medians.begin(), median);
  return medians;
}

}  // namespace bench
