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

comparison compare(const llama& model, const generation& full, std::vector<float> logits,
                   kv_cache& pruned) {
  const std::size_t steps = full.tokens.size() - 1;
  std::vector<std::vector<float>> all = model.score(std::span(full.tokens).first(steps), pruned);
  all.insert(all.begin(), std::move(logits));
  return {compare_logits(full.logits, all), static_cast<double>(steps) / full.seconds};
}

}  // namespace smollm2
