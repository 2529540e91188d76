// SPDX-License-Identifier: Apache-2.0
#include "pass_keys.hpp"

#include <iterator>
#include <random>

namespace evaluate {

namespace {

// The standard says what the engine gives, but not what its distributions make of that.
class random_source {
 public:
  explicit random_source(std::uint64_t seed) : engine_(seed) {}

  // In [0, count).
  std::size_t below(std::size_t count) { return engine_() % count; }

  template <std::size_t N>
  std::string one_of(const char* const (&words)[N]) {
    return words[below(N)];
  }

 private:
  std::mt19937_64 engine_;
};

// Sentences enough that few come twice: a repeated one would be no evidence of what is looked at.
std::string filler_sentence(random_source& random) {
  static constexpr const char* subjects[] = {
      "The old baker", "A young teacher",   "The harbour master", "My neighbour",   "The gardener",
      "A tired nurse", "The watchmaker",    "The choir",          "A grey cat",     "The ferryman",
      "The librarian", "A travelling cook", "The mayor",          "Her grandmother"};
  static constexpr const char* verbs[] = {
      "walked slowly past",    "often talked about", "painted",         "looked after",
      "could not find",        "remembered",         "took a photo of", "wrote a letter about",
      "waited patiently near", "swept around",       "laughed at",      "dreamed of"};
  static constexpr const char* objects[] = {
      "the wooden bridge",     "the empty market",   "a basket of apples", "the broken clock",
      "the narrow lighthouse", "an unusual garden",  "the quiet station",  "a pair of boots",
      "the blue piano",        "the village school", "a bowl of soup",     "the long river",
      "the last train",        "a stack of chairs"};
  static constexpr const char* adverbials[] = {
      "in the early morning", "after the rain", "on a warm evening",    "before the winter came",
      "during the festival",  "at noon",        "when the wind turned", "for most of the week",
      "on the way home",      "without a word"};
  return random.one_of(subjects) + ' ' + random.one_of(verbs) + ' ' + random.one_of(objects) + ' ' +
         random.one_of(adverbials) + ".";
}

}  // namespace

std::vector<prompt_text> pass_key_prompts(
    std::size_t count, std::uint64_t seed,
    const std::function<std::size_t(const std::string& text)>& tokens_of) {
  constexpr std::size_t shortest = 1000, longest = 3500;
  random_source random(seed);
  std::vector<prompt_text> prompts;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t steps = count > 1 ? count - 1 : 1;
    const std::size_t wanted = shortest + (longest - shortest) * i / steps;
    std::string key;
    for (int digit = 0; digit < 5; ++digit) key += static_cast<char>('0' + random.below(10));
    const std::string answer = "The pass key is " + key;

    std::vector<std::string> sentences;
    for (std::size_t tokens = 0; tokens < wanted; tokens += tokens_of(' ' + sentences.back())) {
      sentences.push_back(filler_sentence(random));
    }
    // Neither among the first tokens nor in a window of the last ones, which some methods keep.
    const std::size_t tenth = sentences.size() / 10;
    const std::size_t place = tenth + random.below(sentences.size() - 2 * tenth);
    sentences.insert(sentences.begin() + static_cast<std::ptrdiff_t>(place),
                     answer + ". Remember it.");
    std::string text;
    for (const std::string& sentence : sentences) text += (text.empty() ? "" : " ") + sentence;
    const std::string number = std::to_string(i + 1);
    prompts.push_back({"pass_key_" + std::string(number.size() < 2 ? "0" : "") + number,
                       text + "\n\nWhat is the pass key?", answer, key});
  }
  return prompts;
}

}  // namespace evaluate
