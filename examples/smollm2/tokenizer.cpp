// SPDX-License-Identifier: Apache-2.0
// Builds the tokenizer from GGUF metadata; encodes and decodes.
#include "tokenizer.hpp"

#include <cstdint>
#include <stdexcept>

#include "byte_alphabet.hpp"

namespace smollm2 {
namespace {

// All other types (control, user-defined, ...) are spelled as they are, not in the byte alphabet.
constexpr std::int64_t normal_type = 1;

void require(const gguf_file& file, std::string_view key, std::string_view expected) {
  const auto value = file.get<std::string_view>(key);
  if (value != expected) {
    throw std::runtime_error(file.path() + " has '" + std::string(value) + "' as " +
                             std::string(key) + "; this example reads '" + std::string(expected) +
                             "'");
  }
}

int token_of(const gguf_file& file, std::string_view key, std::size_t vocabulary) {
  const auto token = file.get<std::int64_t>(key);
  if (token < 0 || static_cast<std::size_t>(token) >= vocabulary) {
    throw std::runtime_error(file.path() + " has a token outside its vocabulary as " +
                             std::string(key));
  }
  return static_cast<int>(token);
}

int lookup(const std::unordered_map<std::string, int>& tokens, const std::string& bytes) {
  const auto entry = tokens.find(bytes);
  if (entry == tokens.end()) {
    throw std::runtime_error("the merge rules name '" + bytes +
                             "', which is not in the vocabulary");
  }
  return entry->second;
}

}  // namespace

tokenizer::tokenizer(const gguf_file& file)
    : frame_(parse_chat_template(file.get<std::string_view>("tokenizer.chat_template"))) {
  require(file, "tokenizer.ggml.model", "gpt2");
  require(file, "tokenizer.ggml.pre", "smollm");
  const auto& spellings = file.get<std::vector<std::string_view>>("tokenizer.ggml.tokens");
  const auto& types = file.get<std::vector<std::int64_t>>("tokenizer.ggml.token_type");
  if (types.size() != spellings.size()) {
    throw std::runtime_error(file.path() + " has not one type for each of its tokens");
  }

  std::unordered_map<std::string, int> normal_tokens;  // bytes -> token
  for (std::size_t i = 0; i < spellings.size(); ++i) {
    if (spellings[i].empty()) throw std::runtime_error(file.path() + " has an empty token");
    const bool normal = types[i] == normal_type;
    bytes_.push_back(normal ? bytes_of(spellings[i]) : std::string(spellings[i]));
    auto& tokens = normal ? normal_tokens : control_tokens_;
    tokens.emplace(bytes_.back(), static_cast<int>(i));
  }

  const int unknown = token_of(file, "tokenizer.ggml.unknown_token_id", bytes_.size());
  for (std::size_t byte = 0; byte < byte_tokens_.size(); ++byte) {
    const auto entry = normal_tokens.find(std::string(1, static_cast<char>(byte)));
    byte_tokens_[byte] = entry == normal_tokens.end() ? unknown : entry->second;
  }

  for (std::string_view rule : file.get<std::vector<std::string_view>>("tokenizer.ggml.merges")) {
    const std::size_t space = rule.find(' ');
    const std::string left = bytes_of(rule.substr(0, space));
    const std::string right =
        space == std::string_view::npos ? std::string() : bytes_of(rule.substr(space + 1));
    pairs_.add(lookup(normal_tokens, left), lookup(normal_tokens, right),
               lookup(normal_tokens, left + right));
  }

  end_token_ = token_of(file, "tokenizer.ggml.eos_token_id", bytes_.size());
  if (file.has("tokenizer.ggml.add_bos_token") && file.get<bool>("tokenizer.ggml.add_bos_token")) {
    prefix_.push_back(token_of(file, "tokenizer.ggml.bos_token_id", bytes_.size()));
  }
}

std::vector<int> tokenizer::encode(std::string_view text) const {
  std::vector<int> tokens = prefix_;
  append_plain(text, tokens);
  return tokens;
}

std::vector<int> tokenizer::encode_chat(std::string_view user_text) const {
  std::vector<int> tokens = prefix_;
  append_with_controls(frame_.opening, tokens);
  append_message(user_text, tokens);
  return tokens;
}

std::vector<int> tokenizer::encode_reply(std::string_view user_text) const {
  std::vector<int> tokens;
  append_with_controls(frame_.reopening, tokens);
  append_message(user_text, tokens);
  return tokens;
}

const std::string& tokenizer::decode(int token) const {
  if (token < 0 || static_cast<std::size_t>(token) >= bytes_.size()) {
    throw std::runtime_error("token " + std::to_string(token) + " is not in the vocabulary");
  }
  return bytes_[static_cast<std::size_t>(token)];
}

std::string tokenizer::decode(std::span<const int> tokens) const {
  std::string text;
  for (const int token : tokens) text += decode(token);
  return text;
}

void tokenizer::append_message(std::string_view user_text, std::vector<int>& tokens) const {
  // One stretch of text to the splitter, as it is where the template is filled in first.
  append_plain(frame_.role + std::string(user_text), tokens);
  append_with_controls(frame_.closing, tokens);
}

void tokenizer::append_plain(std::string_view text, std::vector<int>& tokens) const {
  std::vector<int> piece_tokens;
  for (const std::string_view piece : splitter_.split(text)) {
    piece_tokens.clear();
    for (const char byte : piece) {
      piece_tokens.push_back(byte_tokens_[static_cast<unsigned char>(byte)]);
    }
    const std::vector<int> merged = pairs_.merge(piece_tokens);
    tokens.insert(tokens.end(), merged.begin(), merged.end());
  }
}

void tokenizer::append_with_controls(std::string_view text, std::vector<int>& tokens) const {
  while (!text.empty()) {
    std::size_t first = text.size();
    const std::pair<const std::string, int>* control = nullptr;
    for (const auto& each : control_tokens_) {
      const std::size_t position = text.find(each.first);
      if (position < first) {
        first = position;
        control = &each;
      }
    }
    append_plain(text.substr(0, first), tokens);
    if (control == nullptr) return;
    tokens.push_back(control->second);
    text.remove_prefix(first + control->first.size());
  }
}

}  // namespace smollm2
