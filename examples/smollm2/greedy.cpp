// SPDX-License-Identifier: Apache-2.0
#include "greedy.hpp"

#include "stopwatch.hpp"

namespace smollm2 {

generation generate(const decode_step& decode, std::vector<float> logits, std::size_t count,
                    int end_token) {
  const stopwatch watch;
  generation result{};
  while (result.tokens.size() < count) {
    const int token = top_token(logits);
    if (token == end_token) break;
    result.tokens.push_back(token);
    result.logits.push_back(std::move(logits));
    if (result.tokens.size() < count) logits = decode(token);
  }
  result.seconds = watch.seconds();
  return result;
}

comparison compare(const generation& full, const decode_step& pruned) {
  const std::size_t steps = full.tokens.size() - 1;
  std::vector<std::vector<float>> logits{full.logits.front()};
  for (std::size_t i = 0; i < steps; ++i) logits.push_back(pruned(full.tokens[i]));
  return {compare_logits(full.logits, logits), static_cast<double>(steps) / full.seconds};
}

}  // namespace smollm2
