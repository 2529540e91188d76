// SPDX-License-Identifier: Apache-2.0
// The engine on ggml agrees with the formulas on a tiny model, with whole and with pruned caches.
#include "ggml/llama.hpp"

#include <algorithm>
#include <random>

#include "catch.hpp"
#include "ggml/pruning.hpp"
#include "small_llama.hpp"

using namespace ggml_engine;
using smollm2_test::random_tokens;
using smollm2_test::sees_all;
using smollm2_test::small_llama;

namespace {

llama open(const smollm2_test::gguf_writer& writer, int threads = 2) {
  const smollm2_test::temporary_file file(writer.bytes());
  return llama(smollm2::gguf_file(file.path()), threads);
}

// Keys, values and sums of values are f16: they have 11 bits.
template <class Expected>
void check_close(std::span<const float> actual, const Expected& expected) {
  smollm2_test::check_close(actual, expected, 0.05);
}

}  // namespace

TEST_CASE("ggml's prefill gives the logits of the last token, at all sides of a chunk") {
  const bool tied = GENERATE(true, false);
  const int threads = tied ? 1 : 2;
  const std::size_t count = GENERATE(1u, 2u, 255u, 256u, 257u, 400u);
  CAPTURE(tied, threads, count);
  const small_llama small(tied);
  llama model = open(small.file(), threads);
  const std::vector<int> tokens = random_tokens(count);
  kv_cache cache = model.new_cache();
  check_close(model.prefill(tokens, cache), small.run(tokens, sees_all).logits);
  CHECK(cache.next_position == count);
  CHECK(cache.layers[1].length() == count);
}

TEST_CASE("ggml's prefill hands out the last queries, across chunks") {
  const small_llama small;
  llama model = open(small.file());
  const std::vector<int> tokens = random_tokens(260);
  const auto expected = small.run(tokens, sees_all).queries;
  for (const std::size_t window : {1u, 10u, 1000u}) {
    kv_cache cache = model.new_cache();
    std::size_t calls = 0;
    prefill_hooks hooks{window, {}, {}};
    hooks.on_layer = [&](std::size_t layer, std::span<const float> queries, layer_cache& filled) {
      CHECK(layer == calls++);
      CHECK(filled.length() == 260);
      REQUIRE(queries.size() == std::min<std::size_t>(window, 260) * small_llama::embedding);
      check_close(queries, std::span(expected[layer]).last(queries.size()));
    };
    model.prefill(tokens, cache, hooks);
    CHECK(calls == small_llama::layers);
  }
}

TEST_CASE("ggml decodes with layers of lengths that differ as masks would have it") {
  const small_llama small;
  llama model = open(small.file());
  const std::vector<int> tokens = random_tokens(320);
  const std::size_t prompt = 270, budgets[] = {30, 200};
  const auto sees = [&](std::size_t layer, std::size_t, std::size_t query, std::size_t key) {
    return query < prompt || key < 4 || key >= prompt + 4 - budgets[layer];
  };

  kv_cache cache = model.new_cache();
  const auto prune = [&](std::size_t layer, std::span<const float> queries, layer_cache& filled) {
    const refreekv::policy::streaming_llm policy{.budget = {budgets[layer]}};
    pruner(policy, model.config(), 2).prune(layer, queries, filled);
    CHECK(filled.length() == budgets[layer]);
  };
  const std::span all(tokens);
  check_close(model.prefill(all.first(prompt), cache, {1, prune, {}}),
              small.run(all.first(prompt), sees_all).logits);
  // One by one, past the spare room of the first layer.
  for (std::size_t end = prompt + 1; end <= 300; ++end) {
    const auto logits = model.decode(tokens[end - 1], cache);
    if (end % 10 == 0) check_close(logits, small.run(all.first(end), sees).logits);
  }
  // A second text at once.
  check_close(model.prefill(all.subspan(300), cache), small.run(tokens, sees).logits);
  CHECK(cache.next_position == tokens.size());
  CHECK(cache.layers[0].length() == budgets[0] + 50);
}

TEST_CASE("ggml refuses tokens, prompts and files that cannot be") {
  small_llama small;
  llama model = open(small.file());
  kv_cache cache = model.new_cache();
  CHECK_THROWS_WITH(model.prefill({}, cache), Catch::Contains("no tokens"));
  CHECK_THROWS_WITH(model.prefill(random_tokens(401), cache), Catch::Contains("context is 400"));
  CHECK_THROWS_WITH(model.decode(11, cache), Catch::Contains("not in the vocabulary"));
  CHECK_THROWS_WITH(model.decode(-1, cache), Catch::Contains("not in the vocabulary"));
  auto file = small.file();
  file.add_tensor("blk.0.attn_q.bias", {24}, std::vector<float>(24));
  CHECK_THROWS_WITH(open(file), Catch::Contains("would ignore"));
  small.tensors["blk.1.ffn_up.weight"].shape = {24, 20};
  CHECK_THROWS_WITH(open(small.file()), Catch::Contains("blk.1.ffn_up.weight"));
  small.tensors.erase("blk.1.attn_k.weight");
  CHECK_THROWS_WITH(open(small.file()), Catch::Contains("no tensor 'blk.1.attn_k.weight'"));
}
