// SPDX-License-Identifier: Apache-2.0
#include "evaluation.hpp"

#include "generation.hpp"
#include "small_llama.hpp"

using namespace evaluate;

namespace {

smollm2::llama open_model() {
  const smollm2_test::small_llama weights;
  const smollm2_test::temporary_file file(weights.file().bytes());
  return smollm2::llama(smollm2::gguf_file(file.path()), 1);
}

std::vector<int> some_tokens(int count, int first) {
  std::vector<int> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back((first + 3 * i + i * i) % 11);
  return tokens;
}

const refreekv::policy::streaming_llm half{.sinks = 4,
                                           .budget = refreekv::token_budget::share(0.5)};

}  // namespace

TEST_CASE("a question that comes later is fed to what was pruned without it", "[evaluate]") {
  const smollm2::llama model = open_model();
  for (const int question : {0, 7}) {
    CAPTURE(question);
    const tokenized_prompt prompt{"", some_tokens(60, 1), some_tokens(question, 5), {}, 0};
    const prompt_run run(model, prompt, 1, 12, 0, [](double) {});
    CHECK(run.tokens() == 12);
    CHECK_FALSE(run.has_key());

    const measurement full = run.measure(smollm2::keep_everything{}, 1, 0);
    CHECK(full.kept_fraction == 1);
    CHECK(full.against_full.largest_kl < 1e-6);
    CHECK(full.against_full.same_top_token == 1);
    const measurement pruned = run.measure(half, 1, 0);
    CHECK(pruned.kept_fraction == 0.5);
    CHECK(pruned.against_full.largest_kl > 1e-6);
    CHECK(pruned.keys == 0);
  }
}

TEST_CASE("a cache is pruned again while it grows", "[evaluate]") {
  const smollm2::llama model = open_model();
  const tokenized_prompt prompt{"", some_tokens(60, 1), {}, {}, 0};
  const prompt_run run(model, prompt, 4, 50, 0, [](double) {});
  const measurement full = run.measure(smollm2::keep_everything{}, 1, 20);
  CHECK(full.kept_fraction == 1);
  CHECK(full.against_full.largest_kl < 1e-6);
  // The last pruning comes after 100 tokens and leaves half of them; 10 more follow.
  const refreekv::policy::snapkv half{.budget = refreekv::token_budget::share(0.5), .window = 4};
  CHECK(run.measure(half, 1, 20).kept_fraction == Approx(60.0 / 110));
  CHECK(run.measure(half, 1, 0).kept_fraction == 0.5);
}

TEST_CASE("a key is recalled where all of its tokens are the most likely ones", "[evaluate]") {
  const smollm2::llama model = open_model();
  tokenized_prompt prompt{"", some_tokens(60, 1), some_tokens(7, 5), {}, 3};
  smollm2::kv_cache cache = model.new_cache();
  model.prefill(prompt.pruned, cache);
  prompt.answer =
      smollm2::generate(model, model.prefill(prompt.question, cache), cache, 5, -1).tokens;

  const prompt_run right(model, prompt, 1, 12, 0, [](double) {});
  CHECK(right.tokens() == 5);
  CHECK(right.recalls_key());
  CHECK(right.measure(smollm2::keep_everything{}, 1, 0).keys == 1);

  prompt.answer.back() = (prompt.answer.back() + 1) % 11;
  const prompt_run wrong(model, prompt, 1, 12, 0, [](double) {});
  CHECK(wrong.has_key());
  CHECK_FALSE(wrong.recalls_key());
  CHECK(wrong.measure(smollm2::keep_everything{}, 1, 0).keys == 0);
}
