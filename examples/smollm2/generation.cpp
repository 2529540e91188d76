// SPDX-License-Identifier: Apache-2.0
#include "generation.hpp"

#include <algorithm>

namespace smollm2 {

generation generate(const llama& model, std::vector<float> logits, kv_cache& cache,
                    std::size_t count, int end_token, const decode_step& decode) {
  const std::size_t room = model.config().context - cache.next_position();
  return generate(decode, std::move(logits), std::min(count, room + 1), end_token);
}
generation generate(const llama& model, std::vector<float> logits, kv_cache& cache,
                    std::size_t count, int end_token) {
  return generate(model, std::move(logits), cache, count, end_token,
                  [&](int token) { return model.decode(token, cache); });
}

comparison compare(const generation& full, std::vector<float> logits, const score_step& score) {
  const std::size_t steps = full.tokens.size() - 1;
  std::vector<std::vector<float>> all = score(std::span(full.tokens).first(steps));
  all.insert(all.begin(), std::move(logits));
  return {compare_logits(full.logits, all), static_cast<double>(steps) / full.seconds};
}

}  // namespace smollm2
