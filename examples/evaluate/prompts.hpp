// SPDX-License-Identifier: Apache-2.0
// What a cache is pruned on, and what the model is to say then: from texts to tokens.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "tokenizer.hpp"

namespace evaluate {

struct prompt_text {
  std::string name;
  std::string text;    // its last paragraph may be a question about the others
  std::string answer;  // that is known; empty where it is whatever the full cache generates
  std::string key;     // its end, that can only be known from the text; not all of it
};

struct tokenized_prompt {
  std::string name;
  std::vector<int> pruned;    // prefilled, then pruned
  std::vector<int> question;  // fed to the pruned cache; empty where it is among what is pruned
  std::vector<int> answer;    // fed after it; empty where it is not known
  std::size_t key_tokens;     // at the end of the answer, which has others before them

  std::size_t tokens() const { return pruned.size() + question.size() + answer.size(); }
};

// raw: with no chat template around the text. question_later: the text's last paragraph, and what
// the template adds after it, is the question. Nothing where it has one paragraph only.
std::optional<tokenized_prompt> tokenize(const prompt_text& prompt,
                                         const smollm2::tokenizer& tokens, bool raw,
                                         bool question_later);

}  // namespace evaluate
