// SPDX-License-Identifier: Apache-2.0
#include "prompts.hpp"

#include <algorithm>

namespace evaluate {

namespace {

// How many of the first tokens are the same.
std::size_t common_prefix(const std::vector<int>& a, const std::vector<int>& b) {
  return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first -
                                  a.begin());
}

}  // namespace

std::optional<tokenized_prompt> tokenize(const prompt_text& prompt,
                                         const smollm2::tokenizer& tokens, bool raw,
                                         bool question_later) {
  const auto encode = [&](const std::string& text) {
    return raw ? tokens.encode(text) : tokens.encode_chat(text);
  };
  tokenized_prompt result{prompt.name, encode(prompt.text), {}, {}, 0};
  if (question_later) {
    const std::size_t paragraph = prompt.text.rfind("\n\n");
    if (paragraph == std::string::npos) return std::nullopt;
    // Not the tokens of two texts: how a text is split depends on what comes next.
    const std::size_t shared =
        common_prefix(result.pruned, encode(prompt.text.substr(0, paragraph)));
    const auto first = result.pruned.begin() + static_cast<std::ptrdiff_t>(shared);
    result.question.assign(first, result.pruned.end());
    result.pruned.erase(first, result.pruned.end());
  }
  if (!prompt.answer.empty()) {
    const std::vector<int> all = tokens.encode(prompt.answer);
    const std::string before_key(prompt.answer, 0, prompt.answer.size() - prompt.key.size());
    result.key_tokens = all.size() - common_prefix(all, tokens.encode(before_key));
    // It follows other text: without what the model's file wants before any text.
    const auto begin = static_cast<std::ptrdiff_t>(tokens.encode("").size());
    result.answer.assign(all.begin() + begin, all.end());
  }
  return result;
}

}  // namespace evaluate
