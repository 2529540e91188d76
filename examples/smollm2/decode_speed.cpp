// SPDX-License-Identifier: Apache-2.0
#include "decode_speed.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <iomanip>
#include <numeric>
#include <refreekv/refreekv.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "stopwatch.hpp"

namespace smollm2 {

namespace {

constexpr int rounds = 11, tokens_in_a_round = 5;
// One round more to warm up, and a token of the answer that the cache may not have yet.
static_assert((rounds + 1) * tokens_in_a_round + 1 <= speed_tokens);

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

class memory_reader {
 public:
  memory_reader(std::size_t bytes, int threads)
      : words_(bytes / sizeof(std::uint64_t), 1),
        pool_(threads),
        sums_(static_cast<std::size_t>(threads)) {}

  double bytes_per_second() {
    const stopwatch watch;
    const auto workers = static_cast<std::size_t>(pool_.workers());
    pool_.run([&](int worker) {
      const auto part = static_cast<std::size_t>(worker);
      const auto begin = words_.begin() + offset(part, workers);
      const auto end = words_.begin() + offset(part + 1, workers);
      sums_[part] = std::accumulate(begin, end, std::uint64_t{0});
    });
    const double seconds = watch.seconds();
    const auto sum = std::accumulate(sums_.begin(), sums_.end(), std::uint64_t{0});
    // Always true; but the compiler cannot know, so it has to read.
    return sum == words_.size() ? static_cast<double>(words_.size() * sizeof(words_[0])) / seconds
                                : 0;
  }

 private:
  std::ptrdiff_t offset(std::size_t part, std::size_t parts) const {
    return static_cast<std::ptrdiff_t>(words_.size() * part / parts);
  }

  std::vector<std::uint64_t> words_;
  refreekv::thread_pool pool_;
  std::vector<std::uint64_t> sums_;  // [worker]
};

}  // namespace

double speed_test::gain() const { return full.seconds / pruned.seconds - 1; }

double speed_test::gain_by_bytes() const {
  return (full.bytes - pruned.bytes) / (static_cast<double>(weight_bytes) + pruned.bytes);
}

double speed_test::gain_by_fit() const {
  const double slope = (full.seconds - half.seconds) / (full.bytes - half.bytes);
  return full.seconds / (full.seconds + slope * (pruned.bytes - full.bytes)) - 1;
}

double speed_test::share_of_bandwidth(const measured_speed& speed) const {
  return (static_cast<double>(weight_bytes) + speed.bytes) / speed.seconds / bandwidth;
}

void require_room_for_speed(std::size_t prompt, std::size_t answer, std::size_t context) {
  if (prompt + answer + speed_tokens <= context) return;
  throw std::runtime_error("no room to measure speed: the prompt's " + std::to_string(prompt) +
                           " tokens, " + std::to_string(answer) + " to generate and " +
                           std::to_string(speed_tokens) + " to measure; the model's context is " +
                           std::to_string(context));
}

speed_test measure_speed(const decoding_cache& full, const decoding_cache& half,
                         const decoding_cache& pruned, std::size_t weight_bytes, int threads) {
  const std::array caches{&full, &half, &pruned};
  std::array<std::vector<double>, 3> seconds;
  std::array<double, 3> bytes{};
  std::vector<double> bandwidth;
  memory_reader memory(weight_bytes, threads);
  for (int round = -1; round < rounds; ++round) {  // one to warm up
    for (std::size_t i = 0; i < caches.size(); ++i) {
      const stopwatch watch;
      for (int token = 0; token < tokens_in_a_round; ++token) caches[i]->decode();
      if (round >= 0) seconds[i].push_back(watch.seconds() / tokens_in_a_round);
      if (round == rounds / 2) bytes[i] = static_cast<double>(caches[i]->bytes());
    }
    bandwidth.push_back(memory.bytes_per_second());
  }
  const auto speed = [&](std::size_t i) { return measured_speed{median(seconds[i]), bytes[i]}; };
  return {speed(0), speed(1), speed(2), weight_bytes, median(bandwidth)};
}

void print(const speed_test& test, std::ostream& out) {
  const auto row = [&](const char* name, const measured_speed& speed) {
    out << std::fixed << std::left << std::setw(22) << name << std::right << std::setprecision(1)
        << std::setw(8) << speed.tokens_per_second() << " tokens/s, cache " << std::setw(6)
        << speed.bytes / (1 << 20) << " MiB, " << std::setprecision(0) << std::setw(3)
        << 100 * test.share_of_bandwidth(speed) << " % of the bandwidth\n";
  };
  row("full cache", test.full);
  row("full, half the prompt", test.half);
  row("pruned cache", test.pruned);
  out << std::setprecision(1) << "weights " << static_cast<double>(test.weight_bytes) / (1 << 20)
      << " MiB, bandwidth " << test.bandwidth / 1e9 << " GB/s\n";
  if (test.pruned.bytes == test.full.bytes) return;  // nothing gone, nothing to gain
  const auto reached = [&](const char* label, double allowed) {
    out << label << std::setprecision(1) << 100 * allowed << " % (reached: " << std::setprecision(0)
        << 100 * test.gain() / allowed << " %)";
  };
  out << "pruned: " << 100 * test.gain() << " % more tokens/s; ";
  reached("the removed bytes allow ", test.gain_by_bytes());
  reached(", full caches of that size ", test.gain_by_fit());
  out << '\n';
}

}  // namespace smollm2
