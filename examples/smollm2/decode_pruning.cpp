// SPDX-License-Identifier: Apache-2.0
#include "decode_pruning.hpp"

#include <algorithm>
#include <iterator>

namespace smollm2 {

decode_pruning::decode_pruning(const llama& model, pruner& prune, std::size_t every,
                               std::size_t window, std::size_t first_layer)
    : model_(model),
      prune_(prune),
      every_(every),
      window_(std::min(window, every)),
      first_layer_(first_layer),
      recent_(model.config().layers) {}

std::vector<float> decode_pruning::decode(int token, kv_cache& cache) {
  return std::move(append({&token, 1}, cache).front());
}

std::vector<std::vector<float>> decode_pruning::score(std::span<const int> tokens,
                                                      kv_cache& cache) {
  std::vector<std::vector<float>> logits;
  while (!tokens.empty()) {
    const std::size_t count =
        every_ == 0 ? tokens.size() : std::min(tokens.size(), every_ - since_);
    std::ranges::move(append(tokens.first(count), cache), std::back_inserter(logits));
    tokens = tokens.subspan(count);
  }
  return logits;
}

std::vector<std::vector<float>> decode_pruning::append(std::span<const int> tokens,
                                                       kv_cache& cache) {
  if (every_ == 0) return model_.score(tokens, cache);
  since_ += tokens.size();
  const bool due = since_ == every_;
  if (due) since_ = 0;
  const std::size_t row = model_.config().q_heads * model_.config().head_dim;
  prefill_hooks hooks;
  hooks.window = window_;
  hooks.on_layer = [&](std::size_t layer, std::span<const float> queries, kv_cache& filled) {
    if (layer < first_layer_) return;
    std::vector<float>& recent = recent_[layer];
    const std::size_t kept = std::min(recent.size(), window_ * row - queries.size());
    recent.erase(recent.begin(), recent.end() - static_cast<std::ptrdiff_t>(kept));
    recent.insert(recent.end(), queries.begin(), queries.end());
    if (due) prune_.prune(layer, recent, filled);
  };
  return model_.score(tokens, cache, hooks);
}

}  // namespace smollm2
