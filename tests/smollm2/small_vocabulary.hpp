// SPDX-License-Identifier: Apache-2.0
// A tokenizer of bytes and four merges, with a chat template.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf_writer.hpp"
#include "tokenizer.hpp"

namespace smollm2_test {

inline const std::string template_head =
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n";
inline const std::string template_tail =
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' "
    "}}{% endif %}";

// How a vocabulary spells a byte.
inline std::string letter(int byte) {
  int code_point = byte;
  const auto prints = [](int b) {
    return (33 <= b && b <= 126) || (161 <= b && b <= 172) || (174 <= b && b <= 255);
  };
  if (!prints(byte)) {
    code_point = 256;
    for (int b = 0; b < byte; ++b) code_point += !prints(b);
  }
  if (code_point < 0x80) return {static_cast<char>(code_point)};
  return {static_cast<char>(0xc0 | code_point >> 6), static_cast<char>(0x80 | (code_point & 0x3f))};
}

// Tokens: 0 unknown, 1 and 2 the markers, then every byte but 0x04, then the merged ones.
inline gguf_writer small_vocabulary(const std::string& chat_template = template_head + "Sys" +
                                                                       template_tail) {
  std::vector<std::string> tokens{"<unk>", "<|im_start|>", "<|im_end|>"};
  std::vector<std::int32_t> types{2, 3, 3};
  for (int byte = 0; byte < 256; ++byte) {
    if (byte != 4) tokens.push_back(letter(byte));
  }
  std::vector<std::string> merges{"h e", "l l", "he ll", letter(' ') + " h"};
  for (const std::string& rule : merges) {
    std::string merged = rule;
    merged.erase(merged.find(' '), 1);
    tokens.push_back(merged);
  }
  types.resize(tokens.size(), 1);
  gguf_writer file;
  file.add("tokenizer.ggml.model", "gpt2").add("tokenizer.ggml.pre", "smollm");
  file.add("tokenizer.ggml.tokens", tokens).add("tokenizer.ggml.token_type", types);
  file.add("tokenizer.ggml.merges", merges);
  file.add("tokenizer.ggml.unknown_token_id", std::uint32_t{0});
  file.add("tokenizer.ggml.bos_token_id", std::uint32_t{1});
  file.add("tokenizer.ggml.eos_token_id", std::uint32_t{2});
  file.add("tokenizer.chat_template", chat_template);
  return file;
}

inline smollm2::tokenizer open(const gguf_writer& writer) {
  const temporary_file file(writer.bytes());
  return smollm2::tokenizer(smollm2::gguf_file(file.path()));
}

}  // namespace smollm2_test
