// SPDX-License-Identifier: Apache-2.0
// Splitting, merging, the chat template, and a small vocabulary put together from them.
#include "tokenizer.hpp"

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "small_vocabulary.hpp"

using namespace smollm2;
using namespace smollm2_test;
using namespace std::string_literals;

namespace {

std::vector<std::string> split(const std::string& text) {
  const auto pieces = text_splitter().split(text);
  return {pieces.begin(), pieces.end()};
}

using texts = std::vector<std::string>;

// Byte-pair merging as its definition reads: the best rule at its leftmost place, again and again.
std::vector<int> merge_naively(const std::map<std::pair<int, int>, std::pair<int, int>>& rules,
                               std::vector<int> tokens) {
  while (true) {
    auto best = rules.end();
    std::size_t place = 0;
    for (std::size_t i = 0; i + 1 < tokens.size(); ++i) {
      const auto rule = rules.find({tokens[i], tokens[i + 1]});
      if (rule == rules.end()) continue;
      if (best == rules.end() || rule->second.first < best->second.first) {
        best = rule;
        place = i;
      }
    }
    if (best == rules.end()) return tokens;
    tokens[place] = best->second.second;
    tokens.erase(tokens.begin() + static_cast<std::ptrdiff_t>(place) + 1);
  }
}

}  // namespace

TEST_CASE("text splits as GPT-2 does, with every digit alone") {
  CHECK(split("") == texts{});
  CHECK(split("Hello world!") == texts{"Hello", " world", "!"});
  CHECK(split("I'll we've 'tis") == texts{"I", "'ll", " we", "'ve", " '", "tis"});
  CHECK(split("a 42 b") == texts{"a", " ", "4", "2", " b"});
  CHECK(split("a   b") == texts{"a", "  ", " b"});
  CHECK(split("a   4") == texts{"a", "   ", "4"});
  CHECK(split("a \n\n b  ") == texts{"a", " \n\n", " b", "  "});
  CHECK(split(" ?!\tx") == texts{" ?!", "\t", "x"});
  CHECK(split("naïve Ωmega 日本") == texts{"naïve", " Ωmega", " 日本"});
  CHECK(split("½²٣") == texts{"½", "²", "٣"});
}

TEST_CASE("bytes that are not UTF-8 split off one by one, and none is lost") {
  CHECK(split("ab\xff\xfe c") == texts{"ab", "\xff", "\xfe", " c"});
  CHECK(split("\x80") == texts{"\x80"});
  CHECK(split("a\xe2\x82") == texts{"a", "\xe2", "\x82"});
  CHECK(split("\xed\xa0\x80!") == texts{"\xed", "\xa0", "\x80", "!"});

  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {
    std::string text(random() % 40, ' ');
    for (char& byte : text) byte = static_cast<char>(random());
    std::string joined;
    for (const std::string& piece : split(text)) joined += piece;
    CHECK(joined == text);
  }
}

TEST_CASE("long runs split in reasonable time") {
  const std::size_t size = 1'000'000;
  CHECK(split(std::string(size, 'a')).size() == 1);
  CHECK(split(std::string(size, ' ') + "a").size() == 2);
  CHECK(split(std::string(size, '1')).size() == size);
  CHECK(split(std::string(size, '\xff')).size() == size);
}

TEST_CASE("pairs merge by rank and from the left, as the definition reads") {
  std::mt19937 random(2);
  for (int round = 0; round < 300; ++round) {
    byte_pairs pairs;
    std::map<std::pair<int, int>, std::pair<int, int>> rules;  // pair -> rank, merged
    for (int rank = 0; rank < 12; ++rank) {
      const auto any = [&] { return static_cast<int>(random() % static_cast<unsigned>(3 + rank)); };
      const std::pair pair{any(), any()};
      if (!rules.emplace(pair, std::pair{rank, 3 + rank}).second) continue;
      pairs.add(pair.first, pair.second, 3 + rank);
    }
    std::vector<int> tokens(random() % 60);
    for (int& token : tokens) token = static_cast<int>(random() % 3);
    CHECK(pairs.merge(tokens) == merge_naively(rules, tokens));
  }
}

TEST_CASE("a million equal tokens merge in reasonable time") {
  byte_pairs pairs;
  for (int token = 0; token < 10; ++token) pairs.add(token, token, token + 1);
  CHECK(pairs.merge(std::vector<int>(1 << 20, 0)).size() == 1 << 10);
}

TEST_CASE("only the ChatML template is taken, with its own system message") {
  const chat_frame frame = parse_chat_template(template_head + "Be brief." + template_tail);
  CHECK(frame.opening == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>");
  CHECK(frame.role == "user\n");
  CHECK(frame.closing == "<|im_end|>\n<|im_start|>assistant\n");

  const std::string message = "the model's chat template is not the ChatML form of SmolLM2";
  CHECK_THROWS_WITH(parse_chat_template(""), message);
  CHECK_THROWS_WITH(parse_chat_template("{{ messages }}"), message);
  CHECK_THROWS_WITH(parse_chat_template(template_head), message);
  CHECK_THROWS_WITH(parse_chat_template(template_head + "it's" + template_tail), message);
  CHECK_THROWS_WITH(parse_chat_template(template_head + "a" + template_tail + "b"), message);
}

TEST_CASE("text survives a round trip through tokens") {
  const tokenizer tokens = open(small_vocabulary());
  for (const std::string& text : {""s, "hello  hello"s, "\0zero"s, "tab\tnew\r\n\n line "s,
                                  "naïve 日本 🦜🏽"s, "\xff\xc0 bad"s, "<|im_end|>"s, "123 456"s}) {
    CHECK(tokens.decode(tokens.encode(text)) == text);
  }
  CHECK(tokens.encode("hell").size() == 1);
  CHECK(tokens.encode("hello").size() == 2);
  CHECK(tokens.encode("he he").size() == 3);  // " h" is ranked below "he", so nothing joins to it
}

TEST_CASE("a byte without a token becomes the unknown token") {
  const tokenizer tokens = open(small_vocabulary());
  CHECK(tokens.encode("a\4b").size() == 3);
  CHECK(tokens.encode("a\4b")[1] == 0);
}

TEST_CASE("markers are control tokens in the chat's frame and plain text in the user's") {
  const tokenizer tokens = open(small_vocabulary());
  const std::string user = "a<|im_end|>b";
  const std::vector<int> chat = tokens.encode_chat(user);
  CHECK(tokens.decode(chat) == "<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\n" + user +
                                   "<|im_end|>\n<|im_start|>assistant\n");
  CHECK(std::count(chat.begin(), chat.end(), 1) == 3);
  CHECK(std::count(chat.begin(), chat.end(), 2) == 2);
  CHECK(chat.front() == 1);
  CHECK(tokens.end_token() == 2);
}

TEST_CASE("a reply goes on where the answer ends, as the template would") {
  const tokenizer tokens = open(small_vocabulary());
  std::vector<int> chat = tokens.encode_chat("a");
  const std::vector<int> answer = tokens.encode("b"), reply = tokens.encode_reply("a<|im_end|>b");
  chat.insert(chat.end(), answer.begin(), answer.end());
  chat.insert(chat.end(), reply.begin(), reply.end());
  CHECK(tokens.decode(chat) ==
        "<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        "b<|im_end|>\n<|im_start|>user\na<|im_end|>b<|im_end|>\n<|im_start|>assistant\n");
  CHECK(reply.front() == tokens.end_token());
  CHECK(std::count(reply.begin(), reply.end(), 1) == 2);
  CHECK(std::count(reply.begin(), reply.end(), 2) == 2);
}

TEST_CASE("tokens outside the vocabulary are refused") {
  const tokenizer tokens = open(small_vocabulary());
  CHECK_THROWS_WITH(tokens.decode(-1), "token -1 is not in the vocabulary");
  CHECK_THROWS_AS(tokens.decode(static_cast<int>(tokens.size())), std::runtime_error);
}

TEST_CASE("other tokenizers are refused") {
  gguf_writer file;
  file.add("tokenizer.chat_template", template_head + template_tail);
  file.add("tokenizer.ggml.model", "llama");
  CHECK_THROWS_AS(open(file), std::runtime_error);
}
