// SPDX-License-Identifier: Apache-2.0
// Text to tokens and back: byte-level BPE with the vocabulary of a GGUF file.
#pragma once

#include <array>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "byte_pairs.hpp"
#include "chat_template.hpp"
#include "gguf.hpp"
#include "text_splitter.hpp"

namespace smollm2 {

class tokenizer {
 public:
  // Copies what it needs: the file may be closed afterwards.
  explicit tokenizer(const gguf_file& file);

  // Plain text: the spelling of a control token in it is text like any other. A byte for which the
  // vocabulary has no token becomes the unknown token; all other text survives decoding.
  std::vector<int> encode(std::string_view text) const;

  // The user's text, verbatim, as the one message of a conversation that the model is to answer.
  std::vector<int> encode_chat(std::string_view user_text) const;

  // The user's next message, from where the model's answer ends (its end token is not part of it).
  std::vector<int> encode_reply(std::string_view user_text) const;

  // Bytes, not characters: a character of UTF-8 may be spread over several tokens.
  const std::string& decode(int token) const;
  std::string decode(std::span<const int> tokens) const;

  // The model ends its answer with this token.
  int end_token() const { return end_token_; }
  std::size_t size() const { return bytes_.size(); }

 private:
  void append_message(std::string_view user_text, std::vector<int>& tokens) const;
  void append_plain(std::string_view text, std::vector<int>& tokens) const;
  void append_with_controls(std::string_view text, std::vector<int>& tokens) const;

  std::vector<std::string> bytes_;                       // [token]
  std::unordered_map<std::string, int> control_tokens_;  // spelling -> token
  std::array<int, 256> byte_tokens_;                     // [byte]
  byte_pairs pairs_;
  text_splitter splitter_;
  chat_frame frame_;
  std::vector<int> prefix_;  // what the file wants before any text
  int end_token_;
};

}  // namespace smollm2
