// SPDX-License-Identifier: Apache-2.0
#include "evaluation.hpp"

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

prompt_run::pruned_cache prompt_run::prune(pruning_policy policy, int threads) const {
  set_layers(policy, full_.layers());
  pruned_cache result{full_, 0, 0};
  const llama_config& config = model_.config();
  pruner prune(policy, config.q_heads, threads);
  const std::size_t row = config.q_heads * config.head_dim;
  for (std::size_t layer = full_layers_; layer < full_.layers(); ++layer) {
    const std::span<const float> queries = queries_[layer];
    const std::size_t rows = std::min(window_of(policy), queries.size() / row);
    result.select_seconds +=
        prune.prune(layer, queries.last(rows * row), result.cache).library_seconds;
  }
  std::size_t kept = 0, all = 0;
  for (std::size_t layer = 0; layer < full_.layers(); ++layer) {
    for (std::size_t head = 0; head < config.kv_heads; ++head) {
      kept += result.cache.layer(layer).length(head);
      all += full_.layer(layer).length(head);
    }
  }
  result.kept_fraction = static_cast<double>(kept) / static_cast<double>(all);
  return result;
}

// The tokens before the key are given, and each of the key's that came before the next one.
bool prompt_run::recalls_key(logits_view logits) const {
  bool recalls = has_key();
  for (std::size_t i = answer_.size() - key_tokens_; i < answer_.size(); ++i) {
    recalls = recalls && top_token(logits[i - 1]) == answer_[i];
  }
  return recalls;
}

measurement prompt_run::measure(const pruning_policy& policy, int threads) const {
  pruned_cache pruned = prune(policy, threads);
  const auto bytes = static_cast<double>(pruned.cache.bytes());
  if (!question_.empty()) model_.prefill(question_, pruned.cache);
  const std::vector<std::vector<float>> logits = model_.score(answer_, pruned.cache);
  const std::size_t keys = recalls_key() && recalls_key(logits) ? 1 : 0;
  return {pruned.kept_fraction, compare_logits(logits_, logits), keys, pruned.select_seconds,
          bytes};
}

}  // namespace evaluate
