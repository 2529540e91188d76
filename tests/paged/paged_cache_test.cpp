// SPDX-License-Identifier: Apache-2.0
// Attention over pages is attention over what was kept, and shared pages stay as they are.
#include "paged_cache.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>

#include "catch.hpp"
#include "page_pruning.hpp"
#include "pruning.hpp"
#include "tiny_model.hpp"

using namespace paged;
using refreekv::kept_range;

namespace {

constexpr std::size_t layers = smollm2_test::small_llama::layers;

page_shape shape_of(std::size_t page_tokens) {
  return {page_tokens, smollm2_test::small_llama::kv_heads, smollm2_test::small_llama::head_dim};
}

std::vector<std::byte> contents(const page_pool& pool, const std::vector<block_id>& table,
                                std::size_t pages) {
  std::vector<std::byte> bytes;
  for (std::size_t page = 0; page < pages; ++page) {
    const auto of_page = pool.bytes_of(table[page]);
    bytes.insert(bytes.end(), of_page.begin(), of_page.end());
  }
  return bytes;
}

}  // namespace

TEST_CASE("logits from pages are those from the engine's own cache") {
  const std::size_t page_tokens = GENERATE(1u, 4u, 16u, 100u);
  CAPTURE(page_tokens);
  const tiny_model model;
  const std::vector<int> prompt = random_tokens(141, 1), more = random_tokens(20, 2);
  page_pool pool(shape_of(page_tokens), 2 * layers * 161);
  const std::size_t all = pool.manager.free_blocks();
  {
    auto cache = paged_cache::admit(pool, layers, prompt.size() + more.size());
    REQUIRE(cache);
    CHECK(cache->pages() == layers * ((161 + page_tokens - 1) / page_tokens));
    CHECK(pool.manager.free_blocks() == all - cache->pages());
    smollm2::kv_cache engine_cache = model.network.new_cache();
    CHECK(largest_difference(model.network.prefill(prompt, *cache),
                             model.network.prefill(prompt, engine_cache)) <= 1e-5);
    auto copy = paged_cache::admit(pool, layers, prompt.size() + more.size());
    REQUIRE(copy);
    for (std::size_t l = 0; l < layers; ++l) copy->layer(l).assign(cache->layer(l));
    copy->advance(prompt.size());
    for (const int token : more) {
      const std::vector<float> logits = model.network.decode(token, engine_cache);
      CHECK(largest_difference(model.network.decode(token, *cache), logits) <= 1e-5);
      CHECK(largest_difference(model.network.decode(token, *copy), logits) <= 1e-5);
    }
    CHECK(cache->next_position() == 161);
  }
  CHECK(pool.manager.free_blocks() == all);
}

TEST_CASE("a sequence is admitted with all of its pages or not at all") {
  page_pool pool(shape_of(4), layers * 10);
  auto first = paged_cache::admit(pool, layers, 28);
  REQUIRE(first);
  CHECK(pool.manager.free_blocks() == layers * 3);
  CHECK_FALSE(paged_cache::admit(pool, layers, 13));
  CHECK(pool.manager.free_blocks() == layers * 3);
  CHECK(paged_cache::admit(pool, layers, 12));  // and gone again
  first.reset();
  CHECK(pool.manager.free_blocks() == layers * 10);
}

TEST_CASE("a full table and a shared page are not written") {
  page_pool pool(shape_of(4), 3);
  const std::vector<float> row(pool.shape().kv_heads * pool.shape().head_dim, 1);
  paged_layer layer(pool, *pool.manager.allocate(2), 7);
  pool.manager.share(layer.table()[1]);
  CHECK(layer.shared_pages() == std::vector<std::uint8_t>{2});
  CHECK_THROWS_AS(layer.append(row, row), std::logic_error);
  CHECK(layer.length(0) == 7);
  pool.manager.release(layer.table()[1]);
  CHECK(layer.shared_pages() == std::vector<std::uint8_t>{0});
  layer.append(row, row);
  CHECK(layer.length(0) == 8);
  CHECK_THROWS_AS(layer.append(row, row), std::length_error);
  CHECK(layer.length(0) == 8);
}

TEST_CASE("what is released comes back, and attention sees what is kept") {
  struct cut_of_layers {
    const char* name;
    std::array<kept_range, layers> kept;
    std::array<bool, layers> sinks_move;  // where nothing is shared
  };
  // 150 tokens in pages of 16, of which the first 64 may be shared. Then sinks stay: to move them
  // would free no page.
  const auto [name, kept, sinks_move] = GENERATE(values<cut_of_layers>(
      {{"behind what is shared", {{{4, 120, 150}, {4, 97, 150}}}, {true, false}},
       {"inside and behind", {{{4, 50, 150}, {4, 85, 150}}}, {false, true}},
       {"everything, and next to nothing", {{{0, 0, 150}, {4, 149, 150}}}, {false, true}},
       {"no sinks", {{{0, 80, 150}, {0, 30, 150}}}, {false, false}},
       {"more sinks than a page", {{{20, 137, 150}, {40, 41, 150}}}, {true, false}}}));
  const std::size_t shared = GENERATE(0u, 64u);
  CAPTURE(name, shared);
  const tiny_model model;
  const std::vector<int> tokens = random_tokens(150 + 40, 3);
  const std::span<const int> all(tokens);

  page_pool pool(shape_of(16), layers * 12);
  auto prefix = paged_cache::admit(pool, layers, shared);
  if (shared > 0) model.network.prefill(all.first(shared), *prefix);
  auto cache = paged_cache::admit(pool, layers, tokens.size(), &*prefix);
  REQUIRE(cache);
  CHECK(pool.manager.free_blocks() == 0);
  std::vector<std::vector<std::byte>> before;
  for (std::size_t l = 0; l < layers; ++l) {
    before.push_back(contents(pool, prefix->layer(l).table(), shared / 16));
    CHECK(std::equal(prefix->layer(l).table().begin(), prefix->layer(l).table().end(),
                     cache->layer(l).table().begin()));
  }

  std::size_t returned = 0;
  const auto prune = [&](std::size_t layer, std::span<const float>, paged_cache& filled) {
    const page_release result = release(kept[layer], filled.layer(layer));
    CHECK(result.promised == result.returned.size());
    CHECK(result.pages_after == filled.layer(layer).table().size());
    returned += result.returned.size();
    CHECK(pool.manager.free_blocks() == returned);
    const bool moved = filled.layer(layer).slots().sinks == 0 && kept[layer].sinks > 0;
    CHECK(moved == (shared == 0 && sinks_move[layer]));
  };
  model.network.prefill(all.subspan(shared, 150 - shared), *cache, {.on_layer = prune});
  CHECK(returned > 0);
  const auto visible = [&](std::size_t layer, std::size_t, std::size_t query, std::size_t key) {
    return query < 150 || key >= 150 || kept[layer].keeps(static_cast<refreekv::index_t>(key));
  };
  for (std::size_t next = 150; next < tokens.size(); ++next) {
    CHECK(cache->next_position() == next);
    CHECK(largest_difference(model.network.decode(tokens[next], *cache),
                             model.formulas.run(all.first(next + 1), visible).logits) < 1e-4);
  }
  for (std::size_t l = 0; l < layers; ++l) {
    CHECK(cache->layer(l).length(0) == static_cast<std::size_t>(kept[l].length()) + 40);
    CHECK(contents(pool, prefix->layer(l).table(), shared / 16) == before[l]);
  }
  cache.reset();
  CHECK(pool.manager.free_blocks() == layers * (12 - shared / 16));
}

TEST_CASE("pages hold what faithful leaves in the engine's own cache") {
  using refreekv::policy::faithful;
  const faithful policy = GENERATE(values<faithful>({{.window = 8},
                                                     {.sinks = 100, .stand_ins = false},
                                                     {.tolerance = 0.05, .error_term = false}}));
  const std::size_t page_tokens = GENERATE(1u, 16u, 64u), shared = GENERATE(0u, 64u);
  const std::size_t prompt = GENERATE(67u, 192u, 250u), more = 40;
  CAPTURE(policy.window, policy.stand_ins, page_tokens, shared, prompt);
  const tiny_model model;
  const std::vector<int> tokens = random_tokens(prompt + more, 3);
  const auto prefix = std::span(tokens).first(shared);
  const auto suffix = std::span(tokens).subspan(shared, prompt - shared);

  faithful engine_policy = policy;  // with what pages ask for
  engine_policy.scope = refreekv::cut_scope::layer;
  engine_policy.sinks = std::max(policy.sinks, static_cast<refreekv::count_t>(shared));
  smollm2::pruner engine(engine_policy, smollm2_test::small_llama::q_heads, 1);
  smollm2::kv_cache engine_cache = model.network.new_cache();
  if (shared > 0) model.network.prefill(prefix, engine_cache);
  smollm2::prefill_hooks to_engine{.window = policy.window};
  to_engine.on_layer = [&](std::size_t layer, std::span<const float> queries,
                           smollm2::kv_cache& cache) { engine.prune(layer, queries, cache); };
  model.network.prefill(suffix, engine_cache, to_engine);

  page_pool pool(shape_of(page_tokens), layers * (400 / page_tokens));
  auto first = paged_cache::admit(pool, layers, shared);
  if (shared > 0) model.network.prefill(prefix, *first);
  auto cache = paged_cache::admit(pool, layers, tokens.size(), &*first);
  REQUIRE(cache);
  std::vector<std::vector<std::byte>> before;
  for (std::size_t l = 0; l < layers; ++l) {
    before.push_back(contents(pool, first->layer(l).table(), shared / page_tokens));
  }
  const std::size_t free = pool.manager.free_blocks();
  std::vector<page_release> releases;
  model.network.prefill(suffix, *cache,
                        pruning_hooks(policy, smollm2_test::small_llama::q_heads, releases));

  std::size_t returned = 0, dropped = 0, stand_ins = 0;
  for (std::size_t l = 0; l < layers; ++l) {
    const std::size_t length = engine_cache.layer(l).length(0);
    CHECK((releases[l].kept == length && cache->layer(l).length(1) == length));
    CHECK(releases[l].returned.size() == (prompt - length) / page_tokens);
    CHECK(releases[l].promised == releases[l].returned.size());
    CHECK(releases[l].pages_after == cache->layer(l).table().size());
    returned += releases[l].returned.size();
    dropped += prompt - length;
    stand_ins += releases[l].stand_ins;
  }
  CHECK(pool.manager.free_blocks() == free + returned);
  CHECK((prompt < 100 || dropped > 0));
  CHECK((stand_ins > 0) == (policy.stand_ins && dropped > 0));
  for (std::size_t next = prompt; next < tokens.size(); ++next) {
    CHECK(cache->next_position() == next);
    CHECK(largest_difference(model.network.decode(tokens[next], *cache),
                             model.network.decode(tokens[next], engine_cache)) <= 1e-5);
  }
  for (std::size_t l = 0; l < layers; ++l) {
    CHECK(contents(pool, first->layer(l).table(), shared / page_tokens) == before[l]);
  }
  cache.reset();
  first.reset();
  CHECK(pool.manager.free_blocks() == pool.manager.blocks());
}

TEST_CASE("behind a shared prefix there may be fewer queries than the window has") {
  const std::size_t tail = GENERATE(1u, 2u, 3u, 4u, 6u);
  CAPTURE(tail);
  const tiny_model model;
  const std::vector<int> tokens = random_tokens(64 + tail, 5);
  const auto prefix = std::span(tokens).first(64), suffix = std::span(tokens).subspan(64);
  const refreekv::policy::refreekv policy{.threshold = 0.3, .window = 4, .full_layers = 0};

  std::vector<kept_range> expected, kept;  // [layer]
  smollm2::pruner engine(policy, smollm2_test::small_llama::q_heads, 1);
  smollm2::kv_cache engine_cache = model.network.new_cache();
  model.network.prefill(prefix, engine_cache);
  smollm2::prefill_hooks to_engine{.window = policy.window};
  to_engine.on_layer = [&](std::size_t layer, std::span<const float> queries,
                           smollm2::kv_cache& cache) {
    expected.push_back(engine.prune(layer, queries, cache).kept.at(0));
  };
  model.network.prefill(suffix, engine_cache, to_engine);

  page_pool pool(shape_of(16), layers * 5);
  auto cache = paged_cache::admit(pool, layers, tokens.size());
  REQUIRE(cache);
  model.network.prefill(prefix, *cache);
  const auto to_pages = [&](std::size_t layer, std::span<const float> queries, paged_cache& paged) {
    kept.push_back(
        decide(policy, layer, queries, smollm2_test::small_llama::q_heads, paged.layer(layer)));
  };
  model.network.prefill(suffix, *cache, {.window = policy.window, .on_layer = to_pages});
  REQUIRE((kept.size() == layers && expected.size() == layers));
  for (std::size_t layer = 0; layer < layers; ++layer) {
    CHECK(expected[layer].cut > expected[layer].sinks);
    CHECK(kept[layer].cut == expected[layer].cut);
    CHECK(kept[layer].tokens == expected[layer].tokens);
    CHECK(std::abs(kept[layer].loss - expected[layer].loss) < 1e-5f);
  }
}
