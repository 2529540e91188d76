// SPDX-License-Identifier: Apache-2.0
#include "prompts.hpp"

#include "catch.hpp"
#include "small_vocabulary.hpp"

using namespace evaluate;

namespace {

std::vector<int> joined(std::vector<int> first, const std::vector<int>& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

}  // namespace

TEST_CASE("a question that comes later is the rest of the same tokens", "[evaluate]") {
  const smollm2::tokenizer tokens = smollm2_test::open(smollm2_test::small_vocabulary());
  const prompt_text prompt{"p", "One hello.\n\nTwo hells.\n\nWhat is hell?", "", ""};
  for (const bool raw : {false, true}) {
    CAPTURE(raw);
    const std::vector<int> all = raw ? tokens.encode(prompt.text) : tokens.encode_chat(prompt.text);
    const auto first = tokenize(prompt, tokens, raw, false);
    REQUIRE(first);
    CHECK(first->pruned == all);
    CHECK(first->question.empty());
    CHECK(first->answer.empty());

    const auto later = tokenize(prompt, tokens, raw, true);
    REQUIRE(later);
    CHECK(joined(later->pruned, later->question) == all);
    CHECK(tokens.decode(later->pruned).ends_with("Two hells."));
    CHECK(later->tokens() == all.size());
  }
  CHECK_FALSE(tokenize({"p", "What is hell?", "", ""}, tokens, false, true));
}

TEST_CASE("a key is the end of its answer", "[evaluate]") {
  const smollm2::tokenizer tokens = smollm2_test::open(smollm2_test::small_vocabulary());
  const auto prompt = tokenize({"p", "The key is 123.", "It is 123", "123"}, tokens, false, false);
  REQUIRE(prompt);
  CHECK(tokens.decode(prompt->answer) == "It is 123");
  CHECK(prompt->key_tokens == 3);
  CHECK(prompt->tokens() == prompt->pruned.size() + prompt->answer.size());
}
