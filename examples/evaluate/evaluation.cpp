// SPDX-License-Identifier: Apache-2.0
#include "evaluation.hpp"

#include "decode_pruning.hpp"
#include "generation.hpp"

namespace evaluate {

using namespace smollm2;

prompt_run::prompt_run(const llama& model, const tokenized_prompt& prompt, std::size_t window,
                       std::size_t tokens, std::size_t full_layers,
                       const std::function<void(double)>& on_progress)
    : model_(model),
      full_layers_(full_layers),
      full_(model.new_cache()),
      question_(prompt.question),
      answer_(prompt.answer),
      key_tokens_(prompt.key_tokens) {
  prefill_hooks hooks;
  hooks.window = window;
  hooks.on_layer = [&](std::size_t, std::span<const float> queries, kv_cache&) {
    queries_.emplace_back(queries.begin(), queries.end());
  };
  hooks.on_progress = on_progress;
  std::vector<float> logits = model.prefill(prompt.pruned, full_, hooks);

  kv_cache cache = full_;
  if (!question_.empty()) logits = model.prefill(question_, cache);
  if (!answer_.empty()) {
    logits_ = model.score(answer_, cache);
    return;
  }
  // One token more than is fed: it comes with the logits after the last one.
  generation answer = generate(model, std::move(logits), cache, tokens + 1, -1);
  answer_.assign(answer.tokens.begin(), answer.tokens.end() - 1);
  logits_.assign(std::make_move_iterator(answer.logits.begin() + 1),
                 std::make_move_iterator(answer.logits.end()));
}

kv_cache prompt_run::prune(pruner& prune, std::size_t window, double& select_seconds) const {
  kv_cache cache = full_;
  const std::size_t row = model_.config().q_heads * model_.config().head_dim;
  for (std::size_t layer = full_layers_; layer < full_.layers(); ++layer) {
    const std::span<const float> queries = queries_[layer];
    const std::size_t rows = std::min(window, queries.size() / row);
    select_seconds += prune.prune(layer, queries.last(rows * row), cache).library_seconds;
  }
  return cache;
}

double prompt_run::kept_fraction(const kv_cache& cache, std::size_t tokens) const {
  std::size_t kept = 0;
  for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
    for (std::size_t head = 0; head < model_.config().kv_heads; ++head) {
      kept += cache.layer(layer).length(head);
    }
  }
  const std::size_t heads = cache.layers() * model_.config().kv_heads;
  return static_cast<double>(kept) / static_cast<double>(heads * tokens);
}

// The tokens before the key are given, and each of the key's that came before the next one.
bool prompt_run::recalls_key(logits_view logits) const {
  bool recalls = has_key();
  for (std::size_t i = answer_.size() - key_tokens_; i < answer_.size(); ++i) {
    recalls = recalls && top_token(logits[i - 1]) == answer_[i];
  }
  return recalls;
}

measurement prompt_run::measure(const pruning_policy& policy, int threads,
                                std::size_t prune_every) const {
  pruning_policy for_model = policy;
  set_layers(for_model, full_.layers());
  const std::size_t window = window_of(for_model);
  pruner pruning(for_model, model_.config().q_heads, threads);
  double select_seconds = 0;
  kv_cache cache = prune(pruning, window, select_seconds);
  double kept = kept_fraction(cache, full_.next_position());
  const auto bytes = static_cast<double>(cache.bytes());
  if (!question_.empty()) model_.prefill(question_, cache);
  decode_pruning decoding(model_, pruning, prune_every, window, full_layers_);
  const std::vector<std::vector<float>> logits = decoding.score(answer_, cache);
  if (prune_every > 0) kept = kept_fraction(cache, cache.next_position());
  const std::size_t keys = recalls_key() && recalls_key(logits) ? 1 : 0;
  return {kept, compare_logits(logits_, logits), keys, select_seconds, bytes};
}

}  // namespace evaluate
