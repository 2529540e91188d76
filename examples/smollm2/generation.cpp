// SPDX-License-Identifier: Apache-2.0
#include "generation.hpp"

#include <algorithm>

namespace smollm2 {

generation generate(const llama& model, std::vector<float> logits, kv_cache& cache,
                    std::size_t count, int end_token) {
  const std::size_t room = model.config().context - cache.next_position();
  return generate([&](int token) { return model.decode(token, cache); }, std::move(logits),
                  std::min(count, room + 1), end_token);
}

comparison compare(const llama& model, const generation& full, kv_cache& pruned) {
  const std::size_t steps = full.tokens.size() - 1;
  std::vector<std::vector<float>> logits = model.score(std::span(full.tokens).first(steps), pruned);
  logits.insert(logits.begin(), full.logits.front());
  return {compare_logits(full.logits, logits), static_cast<double>(steps) / full.seconds};
}

}  // namespace smollm2
