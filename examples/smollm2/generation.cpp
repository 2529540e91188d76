// SPDX-License-Identifier: Apache-2.0
#include "generation.hpp"

#include "stopwatch.hpp"

namespace smollm2 {

generation generate(const llama& model, std::vector<float> logits, kv_cache& cache,
                    std::size_t count, int end_token) {
  const stopwatch watch;
  generation result{};
  while (result.tokens.size() < count) {
    const int token = top_token(logits);
    if (token == end_token) break;
    result.tokens.push_back(token);
    result.logits.push_back(std::move(logits));
    if (result.tokens.size() == count || cache.next_position() == model.config().context) break;
    logits = model.decode(token, cache);
  }
  result.seconds = watch.seconds();
  return result;
}

comparison compare(const llama& model, const generation& full, kv_cache& pruned) {
  const std::size_t steps = full.tokens.size() - 1;
  std::vector<std::vector<float>> logits = model.score(std::span(full.tokens).first(steps), pruned);
  logits.insert(logits.begin(), full.logits.front());
  return {compare_logits(full.logits, logits), static_cast<double>(steps) / full.seconds};
}

}  // namespace smollm2
