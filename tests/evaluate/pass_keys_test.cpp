// SPDX-License-Identifier: Apache-2.0
#include "pass_keys.hpp"

#include <algorithm>
#include <set>

#include "catch.hpp"

using namespace evaluate;

namespace {

// A token for each word, about.
std::size_t words(const std::string& text) {
  return static_cast<std::size_t>(std::count(text.begin(), text.end(), ' '));
}

}  // namespace

TEST_CASE("prompts hide one key of five digits and ask for it", "[evaluate]") {
  const std::vector<prompt_text> prompts = pass_key_prompts(6, 1, words);
  REQUIRE(prompts.size() == 6);
  std::set<std::string> keys, names;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const auto& [name, text, answer, key] = prompts[i];
    CAPTURE(name, key);
    keys.insert(key);
    names.insert(name);
    CHECK(key.size() == 5);
    CHECK(key.find_first_not_of("0123456789") == std::string::npos);
    CHECK(answer == "The pass key is " + key);
    CHECK(text.ends_with("\n\nWhat is the pass key?"));

    const std::size_t place = text.find(key);
    REQUIRE(place != std::string::npos);
    CHECK(text.find(key, place + 1) == std::string::npos);
    CHECK(place > text.size() / 20);
    CHECK(place < text.size() - text.size() / 20);
    const auto wanted = static_cast<double>(1000 + 500 * i);
    CHECK(static_cast<double>(words(text)) == Approx(wanted).margin(30));
  }
  CHECK(keys.size() == prompts.size());
  CHECK(names.size() == prompts.size());
}

TEST_CASE("a seed says what prompts are made", "[evaluate]") {
  const auto text_of = [](std::uint64_t seed) {
    return pass_key_prompts(1, seed, words).front().text;
  };
  CHECK(text_of(3) == text_of(3));
  CHECK(text_of(3) != text_of(4));
  CHECK(pass_key_prompts(0, 3, words).empty());
}
