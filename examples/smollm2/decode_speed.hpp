// SPDX-License-Identifier: Apache-2.0
// How fast an engine decodes with a full and a pruned cache, against what the removed bytes allow.
#pragma once

#include <cstddef>
#include <functional>
#include <ostream>

namespace smollm2 {

// One of an engine's caches. Each call of `decode` appends a token to it.
struct decoding_cache {
  std::function<void()> decode;
  std::function<std::size_t()> bytes;  // of keys and values in use, all of which a token reads
};

struct measured_speed {
  double seconds;  // for a token: the median of alternating runs
  double bytes;    // of the cache, in the middle of these

  double tokens_per_second() const { return 1 / seconds; }
};

// Two models of a token's time t say what pruning from C to C' bytes of cache may gain:
// - bytes: decoding does nothing but read W bytes of weights and the cache, t = (W + C) / B. The
//   gain, t / t' - 1, is (C - C') / (W + C'), whatever the bandwidth B is.
// - fit: t = a + b C through the full caches of the prompt and of its first half; so a pruned cache
//   should be as fast as a full one of that size.
struct speed_test {
  measured_speed full, half, pruned;
  std::size_t weight_bytes;  // W
  double bandwidth;          // B, bytes/s: reading W bytes on as many threads, between these runs

  double gain() const;  // more tokens/s, as a share of the full cache's
  double gain_by_bytes() const;
  double gain_by_fit() const;
  double share_of_bandwidth(const measured_speed& speed) const;  // (W + C) / t / B
};

// Tokens that each cache must have room for to be measured.
constexpr std::size_t speed_tokens = 64;

// Throws std::runtime_error where a context of so many tokens has no room for a prompt, its answer
// and the measurement behind them.
void require_room_for_speed(std::size_t prompt, std::size_t answer, std::size_t context);

// Fewer than speed_tokens tokens with each cache; `half` is a full cache of the first half of the
// prompt.
speed_test measure_speed(const decoding_cache& full, const decoding_cache& half,
                         const decoding_cache& pruned, std::size_t weight_bytes, int threads);

void print(const speed_test& test, std::ostream& out);

}  // namespace smollm2
