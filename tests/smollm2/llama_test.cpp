// SPDX-License-Identifier: Apache-2.0
// The forward pass agrees with the formulas on a tiny model, with whole and with ragged caches.
#include "llama.hpp"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "catch.hpp"
#include "gguf_writer.hpp"
#include "small_llama.hpp"

using namespace smollm2;
using namespace smollm2_test;

namespace {

llama open(const gguf_writer& writer, int threads = 2) {
  const temporary_file file(writer.bytes());
  return llama(gguf_file(file.path()), threads);
}

}  // namespace

TEST_CASE("prefill gives the logits of the last token, at all sides of the block sizes") {
  const bool tied = GENERATE(true, false);
  const int threads = GENERATE(1, 2, 5);
  const std::size_t count = GENERATE(1u, 2u, 127u, 128u, 129u, 256u, 257u, 400u);
  CAPTURE(tied, threads, count);
  const small_llama small(tied);
  const llama model = open(small.file(), threads);
  const std::vector<int> tokens = random_tokens(count);
  kv_cache cache = model.new_cache();
  check_close(model.prefill(tokens, cache), small.run(tokens, sees_all).logits);
  CHECK(cache.next_position() == count);
  CHECK(cache.layer(1).length(1) == count);
}

TEST_CASE("prefill in pieces, and token by token, equals one prefill") {
  const small_llama small;
  const llama model = open(small.file());
  const std::vector<int> tokens = random_tokens(300);
  const std::span all(tokens);
  const auto expected = small.run(tokens, sees_all).logits;

  kv_cache pieces = model.new_cache();
  model.prefill(all.first(140), pieces);
  check_close(model.prefill(all.subspan(140), pieces), expected);

  kv_cache stepwise = model.new_cache();
  model.prefill(all.first(200), stepwise);
  std::vector<float> logits;
  for (const int token : all.subspan(200)) logits = model.decode(token, stepwise);
  check_close(logits, expected);
}

TEST_CASE("on_layer gets the window's rotated queries before the next layer's cache exists") {
  const std::size_t window = GENERATE(0u, 1u, 16u, 300u, 1000u);
  CAPTURE(window);
  const small_llama small;
  const llama model = open(small.file());
  const std::vector<int> tokens = random_tokens(300);
  const auto expected = small.run(tokens, sees_all).queries;
  const std::size_t row = small_llama::q_heads * small_llama::head_dim;

  kv_cache cache = model.new_cache();
  std::size_t calls = 0;
  const auto check_layer = [&](std::size_t layer, std::span<const float> queries,
                               kv_cache& filled) {
    CHECK(layer == calls++);
    CHECK(&filled == &cache);
    CHECK(filled.layer(layer).length(0) == tokens.size());
    for (std::size_t later = layer + 1; later < filled.layers(); ++later) {
      CHECK(filled.layer(later).bytes() == 0);
    }
    const std::size_t rows = std::min(window, tokens.size());
    check_close(queries, std::span(expected[layer]).last(rows * row));
  };
  std::vector<double> progress;
  model.prefill(tokens, cache,
                {.window = window, .on_layer = check_layer, .on_progress = [&](double fraction) {
                   progress.push_back(fraction);
                 }});
  CHECK(calls == small_llama::layers);
  CHECK(progress == std::vector<double>{0.25, 0.5, 0.75, 1});
}

TEST_CASE("after heads are cut to different lengths, later tokens attend as under a mask") {
  const small_llama small;
  const llama model = open(small.file());
  const std::size_t prompt = 270;
  const std::vector<int> tokens = random_tokens(prompt + 80);  // enough to outgrow the cut buffers
  const auto first_kept = [](std::size_t layer, std::size_t kv_head) {
    return 37 + 50 * layer + 90 * kv_head;
  };
  const auto kept = [](std::size_t layer, std::size_t kv_head) {
    return 60 + 40 * layer - 35 * kv_head;
  };

  kv_cache cache = model.new_cache();
  const auto cut = [&](std::size_t layer, std::span<const float>, kv_cache& filled) {
    filled.layer(layer).retain(std::vector{first_kept(layer, 0), first_kept(layer, 1)},
                               std::vector{kept(layer, 0), kept(layer, 1)});
  };
  const auto logits = model.prefill(std::span(tokens).first(prompt), cache, {.on_layer = cut});
  check_close(logits, small.run(std::span(tokens).first(prompt), sees_all).logits);
  CHECK(cache.next_position() == prompt);

  const auto visible = [&](std::size_t layer, std::size_t kv_head, std::size_t query,
                           std::size_t key) {
    const std::size_t first = first_kept(layer, kv_head);
    return query < prompt || key >= prompt || (first <= key && key < first + kept(layer, kv_head));
  };
  SECTION("in decode") {
    for (std::size_t next = prompt; next < tokens.size(); ++next) {
      check_close(model.decode(tokens[next], cache),
                  small.run(std::span(tokens).first(next + 1), visible).logits);
    }
    CHECK(cache.layer(1).length(1) == kept(1, 1) + tokens.size() - prompt);
  }
  SECTION("in one pass that scores each") {
    const auto scored = model.score(std::span(tokens).subspan(prompt), cache);
    REQUIRE(scored.size() == tokens.size() - prompt);
    for (std::size_t i = 0; i < scored.size(); ++i) {
      check_close(scored[i], small.run(std::span(tokens).first(prompt + i + 1), visible).logits);
    }
    CHECK(cache.next_position() == tokens.size());
    CHECK(model.score({}, cache).empty());
  }
  SECTION("in a second prefill") {
    check_close(model.prefill(std::span(tokens).subspan(prompt), cache),
                small.run(tokens, visible).logits);
  }
}

TEST_CASE("tokens that the model cannot take are refused") {
  const llama model = open(small_llama().file());
  kv_cache cache = model.new_cache();
  CHECK_THROWS_WITH(model.prefill({}, cache), "the prompt has no tokens");
  CHECK_THROWS_WITH(model.prefill(random_tokens(401), cache),
                    "the prompt has 401 tokens; the model's context is 400");
  CHECK_THROWS_WITH(model.decode(11, cache), "token 11 is not in the vocabulary");
  CHECK_THROWS_WITH(model.decode(-1, cache), "token -1 is not in the vocabulary");
  CHECK(cache.next_position() == 0);
  model.prefill(random_tokens(400), cache);
  CHECK_THROWS_WITH(model.decode(0, cache), "the model's context of 400 tokens is full");
}

TEST_CASE("files that hold another model are refused") {
  const auto message_of = [](const gguf_writer& writer) {
    try {
      open(writer);
    } catch (const std::runtime_error& error) {
      const std::string message = error.what();
      const std::string name = std::filesystem::temp_directory_path() / "smollm2_test_";
      const std::size_t path = message.find(name);
      return path == std::string::npos ? message
                                       : message.substr(message.find_first_of(" :", path));
    }
    return std::string();
  };
  CHECK(message_of(small_llama().file("gpt2")) ==
        " holds a 'gpt2' model; this example runs 'llama'");

  small_llama missing;
  missing.tensors.erase("blk.1.ffn_up.weight");
  CHECK(message_of(missing.file()) == " has no tensor 'blk.1.ffn_up.weight'");

  small_llama misshapen;
  misshapen.tensors["blk.0.attn_k.weight"] = misshapen.tensors["blk.0.attn_q.weight"];
  CHECK(message_of(misshapen.file()) == " is [24, 24], not [12, 24]");

  small_llama biased;
  biased.tensors["blk.0.attn_q.bias"] = biased.tensors["output_norm.weight"];
  CHECK(message_of(biased.file()) ==
        " has a tensor 'blk.0.attn_q.bias', which this example does not use");
}
