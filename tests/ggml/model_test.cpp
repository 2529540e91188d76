// SPDX-License-Identifier: Apache-2.0
// The real model on ggml: as the other engine computes it, and pruned as if it had been masked.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "catch.hpp"
#include "divergence.hpp"
#include "files.hpp"
#include "generation.hpp"
#include "ggml/llama.hpp"
#include "ggml/pruning.hpp"
#include "pruning.hpp"
#include "resident_memory.hpp"
#include "tokenizer.hpp"

namespace {

using ggml_engine::layer_cache;
using smollm2::pruning_policy;
using all_logits = std::vector<std::vector<float>>;

const pruning_policy window_policy =
    refreekv::policy::refreekv{.window = 16, .average = refreekv::row_average::frobenius};

const smollm2::gguf_file& model_file() {
  const char* path = std::getenv("REFREEKV_MODEL");
  REQUIRE(path != nullptr);
  static const smollm2::gguf_file file(path);
  return file;
}

ggml_engine::llama& model() {
  static ggml_engine::llama loaded(model_file(), 2);
  return loaded;
}

// Its first tokens.
std::vector<int> prompt_named(const std::string& name, std::size_t count) {
  static const smollm2::tokenizer tokens(model_file());
  auto prompt = tokens.encode_chat(smollm2::read_file(REFREEKV_PROMPTS_DIR "/" + name + ".txt"));
  REQUIRE(prompt.size() >= count);
  prompt.resize(count);
  return prompt;
}

// The logits after each of the tokens.
all_logits decode_all(std::span<const int> tokens, ggml_engine::kv_cache& cache) {
  all_logits logits;
  for (const int token : tokens) logits.push_back(model().decode(token, cache));
  return logits;
}

double largest_difference(const all_logits& a, const all_logits& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (std::size_t j = 0; j < a[i].size(); ++j) {
      largest = std::max(largest, std::abs(double{a[i][j]} - double{b[i][j]}));
    }
  }
  return largest;
}

struct prefilled {
  ggml_engine::kv_cache cache;
  std::vector<std::vector<float>> queries;  // [layer] of [window, q_head, head_dim]
  std::vector<float> logits;
};

prefilled prefill(std::span<const int> prompt, std::size_t window) {
  prefilled result{model().new_cache(), {}, {}};
  const auto keep_queries = [&](std::size_t, std::span<const float> queries, layer_cache&) {
    result.queries.emplace_back(queries.begin(), queries.end());
  };
  result.logits = model().prefill(prompt, result.cache, {window, keep_queries, {}});
  return result;
}

std::vector<smollm2::layer_pruning> prune_all(const pruning_policy& policy, const prefilled& from,
                                              ggml_engine::kv_cache& cache) {
  ggml_engine::pruner prune(policy, model().config(), 2);
  std::vector<smollm2::layer_pruning> layers;
  for (std::size_t layer = 0; layer < cache.layers.size(); ++layer) {
    layers.push_back(prune.prune(layer, from.queries[layer], cache.layers[layer]));
  }
  return layers;
}

}  // namespace

TEST_CASE("ggml computes what the example's own engine computes, but for its rounding") {
  const smollm2::llama engine(model_file(), 2);
  const std::vector<int> prompt = prompt_named("definitions", 250);
  for (const pruning_policy& policy : {pruning_policy(smollm2::keep_everything{}), window_policy}) {
    smollm2::kv_cache engine_cache = engine.new_cache();
    smollm2::pruner engine_pruner(policy, engine.config().q_heads, 2);
    smollm2::prefill_hooks hooks;
    hooks.window = smollm2::window_of(policy);
    hooks.on_layer = [&](std::size_t layer, std::span<const float> queries, auto&) {
      engine_pruner.prune(layer, queries, engine_cache.layer(layer));
    };
    const auto answer = smollm2::generate(engine, engine.prefill(prompt, engine_cache, hooks),
                                          engine_cache, 16, -1);

    ggml_engine::kv_cache ours = model().new_cache();
    ggml_engine::pruner ggml_pruner(policy, model().config(), 2);
    const auto prune = [&](std::size_t layer, std::span<const float> queries, layer_cache& cache) {
      ggml_pruner.prune(layer, queries, cache);
    };
    all_logits logits{model().prefill(prompt, ours, {hooks.window, prune, {}})};
    const auto more = decode_all(std::span(answer.tokens).first(15), ours);
    logits.insert(logits.end(), more.begin(), more.end());
    const smollm2::divergence apart = smollm2::compare_logits(answer.logits, logits);
    CHECK(apart.mean_kl < 5e-3);
    // The same top token, or one that is nearly as good: ggml rounds activations to 8 bits.
    for (std::size_t i = 0; i < logits.size(); ++i) {
      const auto chosen = static_cast<std::size_t>(smollm2::top_token(logits[i]));
      const auto best = static_cast<std::size_t>(answer.tokens[i]);
      CHECK(answer.logits[i][best] - answer.logits[i][chosen] < 0.5);
    }
  }
}

TEST_CASE("a layer that was pruned decodes as one whose dropped slots are masked") {
  const std::vector<int> prompt = prompt_named("definitions", 250);
  const prefilled start = prefill(prompt, 16);
  ggml_engine::kv_cache pruned = start.cache.copy(), masked = start.cache.copy();
  const auto layers = prune_all(window_policy, start, pruned);
  std::vector<refreekv::position_t> cuts;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    const refreekv::kept_range& kept = layers[layer].kept.front();
    cuts.push_back(kept.cut);
    masked.layers[layer].hide(
        {static_cast<std::size_t>(kept.sinks), static_cast<std::size_t>(kept.dropped())});
    CHECK(pruned.layers[layer].length() == static_cast<std::size_t>(kept.length()));
  }
  std::sort(cuts.begin(), cuts.end());
  CHECK(std::unique(cuts.begin(), cuts.end()) - cuts.begin() > 10);  // lengths that differ
  CHECK(pruned.next_position == prompt.size());

  const std::vector<int> text = prompt_named("eggs", 40);
  const auto decoded = decode_all(std::span(text).first(16), pruned);
  const auto reference = decode_all(std::span(text).first(16), masked);
  CHECK(largest_difference(decoded, reference) < 1e-4);
  // The whole cache says something else.
  ggml_engine::kv_cache full = start.cache.copy();
  CHECK(largest_difference(decoded, decode_all(std::span(text).first(16), full)) > 0.1);

  // A second text at once, on top of lengths that differ.
  const all_logits next{model().prefill(text, pruned)}, masked_next{model().prefill(text, masked)};
  CHECK(largest_difference(next, masked_next) < 1e-4);
}

TEST_CASE("pruned slots go back to the operating system") {
  const prefilled start = prefill(prompt_named("licence", 600), 1);
  ggml_engine::kv_cache cache = start.cache.copy();
  const pruning_policy policy = refreekv::policy::streaming_llm{.budget = {100}};
  const auto resident = static_cast<double>(smollm2::resident_bytes());
  const auto layers = prune_all(policy, start, cache);
  const auto left = static_cast<double>(smollm2::resident_bytes());
  std::size_t returned = 0, bytes = 0;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    CHECK(layers[layer].bytes_before == start.cache.layers[layer].bytes());
    CHECK(layers[layer].bytes_after == cache.layers[layer].bytes());
    CHECK(cache.layers[layer].length() == 100);
    returned += layers[layer].bytes_before - layers[layer].bytes_after;
    bytes += layers[layer].bytes_before;
  }
  CHECK(static_cast<double>(returned) > 0.7 * static_cast<double>(bytes));
  CHECK(resident - left > 0.9 * static_cast<double>(returned));
}

TEST_CASE("KV heads that keep different numbers of tokens are refused") {
  const prefilled start = prefill(prompt_named("eggs", 60), 1);
  ggml_engine::kv_cache cache = start.cache.copy();
  const pruning_policy per_head = refreekv::policy::refreekv{.scope = refreekv::cut_scope::kv_head};
  CHECK(ggml_engine::why_unsuitable(per_head) != nullptr);
  CHECK(ggml_engine::why_unsuitable(window_policy) == nullptr);
  CHECK_THROWS_WITH(prune_all(per_head, start, cache), Catch::Contains("share its length"));
}
