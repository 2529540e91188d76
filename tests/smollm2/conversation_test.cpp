// SPDX-License-Identifier: Apache-2.0
// One prompt after the other on a cache that each of them prunes: what is left is decided on by
// slot, the text goes on by position.
#include <algorithm>
#include <random>

#include "catch.hpp"
#include "llama.hpp"
#include "pruning.hpp"
#include "reference.hpp"
#include "small_llama.hpp"

using namespace smollm2;
using namespace smollm2_test;

namespace {

constexpr std::size_t layers = small_llama::layers, q_heads = small_llama::q_heads,
                      kv_heads = small_llama::kv_heads, group = q_heads / kv_heads;

// Which tokens each head of each layer still has, followed from the decisions alone.
class mask {
 public:
  // Whether `query` saw `key`: tokens that came before a decision saw what it dropped.
  bool operator()(std::size_t layer, std::size_t kv_head, std::size_t query,
                  std::size_t key) const {
    const auto& dropped = dropped_[layer][kv_head];
    return key >= dropped.size() || dropped[key] == 0 || query < dropped[key];
  }

  std::vector<std::size_t> left(std::size_t layer, std::size_t kv_head, std::size_t text) const {
    std::vector<std::size_t> tokens;
    for (std::size_t t = 0; t < text; ++t) {
      if ((*this)(layer, kv_head, text, t)) tokens.push_back(t);
    }
    return tokens;
  }

  // text: its length when the decision was made about the tokens `left`.
  void drop(std::size_t layer, std::size_t kv_head, std::size_t text,
            const refreekv::kept_range& kept) {
    const std::vector<std::size_t> tokens = left(layer, kv_head, text);
    REQUIRE(tokens.size() == static_cast<std::size_t>(kept.tokens));
    auto& dropped = dropped_[layer][kv_head];
    dropped.resize(text);
    for (refreekv::position_t slot = kept.sinks; slot < kept.cut; ++slot) {
      dropped[tokens[static_cast<std::size_t>(slot)]] = text;
    }
  }

 private:
  std::vector<std::size_t> dropped_[layers][kv_heads];  // [token]: the text's length then, or 0
};

// The rows of the text's last `window` tokens over those that query heads have left.
reference::attention_rows rows_of(const small_llama::result& run, std::size_t layer,
                                  std::size_t first_head, std::size_t heads, std::size_t text,
                                  std::size_t window, const std::vector<std::size_t>& left) {
  reference::attention_rows rows{static_cast<refreekv::index_t>(heads),
                                 static_cast<refreekv::index_t>(window),
                                 static_cast<refreekv::index_t>(left.size()),
                                 {}};
  for (std::size_t h = first_head; h < first_head + heads; ++h) {
    for (std::size_t query = text - window; query < text; ++query) {
      const double* row = run.attention[layer].data() + (h * text + query) * text;
      for (const std::size_t token : left) rows.values.push_back(row[token]);
    }
  }
  return rows;
}

}  // namespace

TEST_CASE("later prompts meet what the rule has left, at the text's positions") {
  using namespace refreekv;
  const std::vector<token_range> keep =
      GENERATE(std::vector<token_range>{}, std::vector<token_range>{{0, 9}, {60, 75}, {210, 400}});
  const auto scope = GENERATE(cut_scope::layer, cut_scope::kv_head);
  const count_t window = GENERATE(1u, 16u);
  CAPTURE(keep.size(), scope, window);
  const policy::refreekv policy{.threshold = 0.25,
                                .window = window,
                                .average = row_average::frobenius,
                                .scope = scope,
                                .full_layers = 0};
  const small_llama small;
  const temporary_file file(small.file().bytes());
  const llama model(gguf_file(file.path()), 2);
  std::mt19937 random(5);
  std::vector<int> text;
  kv_cache cache = model.new_cache();
  pruner prune(policy, q_heads, 2, keep);
  mask sees;
  std::size_t dropped = 0;

  for (const std::size_t prompt : {200u, 5u, 70u, 1u}) {  // some shorter than the window
    CAPTURE(prompt);
    for (std::size_t i = 0; i < prompt; ++i) {
      text.push_back(static_cast<int>(random() % small_llama::vocabulary));
    }
    const small_llama::result expected = small.run(text, sees);
    const std::size_t rows = std::min<std::size_t>(window, prompt);
    mask pruned_mask = sees;
    const auto on_layer = [&](std::size_t layer, std::span<const float> queries, kv_cache& filled) {
      CAPTURE(layer);
      const layer_pruning result = prune.prune(layer, queries, filled);
      REQUIRE(result.kept.size() == (scope == cut_scope::layer ? 1 : kv_heads));
      for (std::size_t head = 0; head < kv_heads; ++head) {
        const kept_range& kept = result.kept[scope == cut_scope::layer ? 0 : head];
        const std::vector<std::size_t> left = sees.left(layer, head, text.size());
        pruned_mask.drop(layer, head, text.size(), kept);
        CHECK(filled.layer(layer).length(head) == static_cast<std::size_t>(kept.length()));
        dropped += static_cast<std::size_t>(kept.dropped());
        for (const token_range& range : keep) {
          for (auto t = static_cast<std::size_t>(range.begin);
               t < std::min(text.size(), static_cast<std::size_t>(range.end)); ++t) {
            REQUIRE(pruned_mask(layer, head, text.size(), t));
          }
        }
        if (!keep.empty()) continue;
        const std::size_t heads = q_heads / result.kept.size();  // that share the cut
        const auto attention =
            rows_of(expected, layer, head * group / heads * heads, heads, text.size(), rows, left);
        const auto decision = reference::decide(attention, 0, static_cast<index_t>(heads), policy);
        CHECK(reference::disagreement(kept, decision, policy.threshold) == "");
      }
    };
    const std::vector<float> logits = model.prefill(std::span(text).last(prompt), cache,
                                                    {.window = window, .on_layer = on_layer});
    check_close(logits, expected.logits);
    sees = pruned_mask;
    for (int step = 0; step < 2; ++step) {
      text.push_back(static_cast<int>(random() % small_llama::vocabulary));
      check_close(model.decode(text.back(), cache), small.run(text, sees).logits);
    }
    CHECK(cache.next_position() == text.size());
  }
  CHECK(dropped > 100);
}

TEST_CASE("faithful judges no token twice") {
  constexpr std::size_t dims = 8;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const auto draw = [&](std::size_t rows) {
    std::vector<float> values(rows * dims);
    for (float& value : values) value = normal(random);
    return values;
  };
  const auto begin_of = [](const layer_cache& cache, std::size_t head, std::size_t slots) {
    return std::pair{std::vector<float>(cache.keys(head), cache.keys(head) + slots * dims),
                     std::vector<float>(cache.values(head), cache.values(head) + slots * dims)};
  };
  pruner prune(refreekv::policy::faithful{.tolerance = 0.3}, q_heads, 2);
  layer_cache cache(kv_heads, dims);
  for (const std::size_t tokens : {300u, 90u, 200u}) {
    CAPTURE(tokens);
    const layer_cache before = cache;
    cache.append(draw(tokens * kv_heads), draw(tokens * kv_heads));
    prune.prune(2, draw(32 * q_heads), cache);
    for (std::size_t head = 0; head < kv_heads; ++head) {
      const std::size_t settled = before.length(head);
      CHECK(cache.length(head) < settled + tokens);
      CHECK(begin_of(cache, head, settled) == begin_of(before, head, settled));
    }
  }
}

TEST_CASE("a share is one of all tokens that the cache ever had") {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const auto draw = [&](std::size_t rows) {
    std::vector<float> values(rows * 8);
    for (float& value : values) value = normal(random);
    return values;
  };
  pruner prune(refreekv::policy::h2o{.budget = refreekv::token_budget::share(0.5),
                                     .recent = refreekv::token_budget::share(0.1),
                                     .window = 1},
               q_heads, 1);
  layer_cache cache(kv_heads, 8);
  std::size_t seen = 0;
  for (const std::size_t tokens : {300u, 100u, 60u}) {
    cache.append(draw(tokens * kv_heads), draw(tokens * kv_heads));
    seen += tokens;
    pruner twin = prune;
    layer_cache copy = cache;
    prune.prune(2, draw(q_heads), cache);
    for (std::size_t head = 0; head < kv_heads; ++head) CHECK(cache.length(head) == seen / 2);
    twin.prune(2, draw(q_heads), copy);
    CHECK(copy.length(0) == seen / 2);
  }
}

TEST_CASE("what a conversation cannot have is refused") {
  using namespace refreekv::policy;
  CHECK_THROWS_WITH(pruner(snapkv{.budget = 8}, q_heads, 1, {{0, 4}}),
                    "protected tokens need a policy that keeps a range");
  std::vector<float> rows(100 * kv_heads * 8, 1.0f), query(q_heads * 8, 1.0f);
  layer_cache cache(kv_heads, 8);
  cache.append(rows, rows);
  cache.retain(std::vector<std::size_t>{0, 0}, std::vector<std::size_t>{50, 60});
  pruner prune(::refreekv::policy::refreekv{}, q_heads, 1);
  CHECK_THROWS_WITH(prune.prune(3, query, cache),
                    "heads that differ in length have no cut in common");
}
