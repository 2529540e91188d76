// SPDX-License-Identifier: Apache-2.0
#include "decode_pruning.hpp"

#include "small_llama.hpp"

using namespace smollm2;
using smollm2_test::small_llama;

TEST_CASE("tokens one by one are pruned as in passes") {
  const small_llama weights;
  const smollm2_test::temporary_file file(weights.file().bytes());
  const llama model(gguf_file(file.path()), 1);
  std::vector<int> prompt, answer;
  for (int i = 0; i < 60; ++i) prompt.push_back((3 * i + i * i) % 11);
  for (int i = 0; i < 30; ++i) answer.push_back((2 * i + i * i * i) % 11);

  const std::vector<pruning_policy> policies{
      keep_everything{}, refreekv::policy::refreekv{.threshold = 0.2, .full_layers = 0},
      refreekv::policy::h2o{.budget = refreekv::token_budget::share(0.5), .recent = 3, .window = 3},
      refreekv::policy::snapkv{.budget = 24, .window = 9},
      refreekv::policy::faithful{.tolerance = 0.3, .window = 4}};
  for (const pruning_policy& policy : policies) {
    CAPTURE(policy.index());
    for (const std::size_t every : {0u, 1u, 7u, 30u}) {
      CAPTURE(every);
      pruner prune(policy, small_llama::q_heads, 1);
      kv_cache by_ones = model.new_cache();
      model.prefill(prompt, by_ones);
      kv_cache by_passes = by_ones;
      pruner twin = prune;
      decode_pruning ones(model, prune, every, window_of(policy));
      decode_pruning passes(model, twin, every, window_of(policy));

      const std::vector<std::vector<float>> expected = passes.score(answer, by_passes);
      REQUIRE(expected.size() == answer.size());
      for (std::size_t i = 0; i < answer.size(); ++i) {
        CAPTURE(i);
        const std::vector<float> logits = ones.decode(answer[i], by_ones);
        for (std::size_t token = 0; token < logits.size(); ++token) {
          CHECK(logits[token] == Approx(expected[i][token]).margin(1e-4));
        }
      }
      const bool prunes = every > 0 && !std::holds_alternative<keep_everything>(policy);
      std::size_t kept = 0, all = 0;
      for (std::size_t layer = 0; layer < small_llama::layers; ++layer) {
        for (std::size_t head = 0; head < small_llama::kv_heads; ++head) {
          CHECK(by_ones.layer(layer).length(head) == by_passes.layer(layer).length(head));
          kept += by_ones.layer(layer).length(head);
          all += prompt.size() + answer.size();
        }
      }
      CHECK((kept < all) == prunes);
    }
  }
}

TEST_CASE("the first layers may be left whole while decoding") {
  const small_llama weights;
  const smollm2_test::temporary_file file(weights.file().bytes());
  const llama model(gguf_file(file.path()), 1);
  const refreekv::policy::streaming_llm policy{.sinks = 2, .budget = 8};
  pruner prune(policy, small_llama::q_heads, 1);
  kv_cache cache = model.new_cache();
  model.prefill(std::vector<int>(20, 3), cache);
  decode_pruning decoding(model, prune, 5, 1, 1);
  decoding.score(std::vector<int>(11, 4), cache);
  CHECK(cache.layer(0).length(0) == 31);
  CHECK(cache.layer(1).length(0) == 9);  // 8 after 10 tokens, and the last one
}
