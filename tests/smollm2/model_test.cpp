// SPDX-License-Identifier: Apache-2.0
// Golden cuts, kept fractions and divergences of the real model under four policies.
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "catch.hpp"
#include "generation.hpp"
#include "pruning.hpp"
#include "tokenizer.hpp"

namespace {

using namespace smollm2;

struct named_policy {
  const char* name;
  refreekv::policy::refreekv policy;
};

const std::vector<named_policy> policies{
    {"default", {}},
    {"full_row", {.norm = refreekv::norm_scope::full_row}},
    {"window 16 frobenius", {.window = 16, .average = refreekv::row_average::frobenius}},
    {"window 16 frobenius, kv_head",
     {.window = 16,
      .average = refreekv::row_average::frobenius,
      .scope = refreekv::cut_scope::kv_head}}};

std::string folder(const char* variable, const char* otherwise) {
  const char* value = std::getenv(variable);
  return value != nullptr ? value : otherwise;
}

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE(file);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

TEST_CASE("the real model is pruned as the golden data says", "[model]") {
  const char* path = std::getenv("REFREEKV_MODEL");
  REQUIRE(path != nullptr);
  const gguf_file file(path);
  const llama model(file, 2);
  const tokenizer tokens(file);
  const auto golden =
      nlohmann::json::parse(read(folder("REFREEKV_GOLDEN", REFREEKV_GOLDEN_DIR) + "/smollm2.json"));

  for (const auto& [name, expected] : golden.items()) {
    INFO(name);
    const std::vector<int> prompt =
        tokens.encode_chat(read(std::string(REFREEKV_PROMPTS_DIR) + "/" + name + ".txt"));
    REQUIRE(prompt == expected.at("token_ids").get<std::vector<int>>());

    // One prefill serves all policies: a layer's pruning does not change the layers above it.
    kv_cache full = model.new_cache();
    std::vector<kv_cache> pruned(policies.size(), full);
    std::vector<std::vector<layer_pruning>> results(policies.size());
    prefill_hooks hooks;
    hooks.window = 16;
    hooks.on_layer = [&](std::size_t layer, std::span<const float> queries, kv_cache& filled) {
      for (std::size_t i = 0; i < policies.size(); ++i) {
        pruned[i].layer(layer) = filled.layer(layer);
        // The policy's rows are the last of those that were kept.
        const std::size_t row = model.config().q_heads * model.config().head_dim;
        pruner prune(policies[i].policy, model.config().q_heads, 2);
        results[i].push_back(prune.prune(layer, queries.last(policies[i].policy.window * row),
                                         pruned[i].layer(layer)));
      }
    };
    const std::vector<float> logits = model.prefill(prompt, full, hooks);
    const auto greedy = expected.at("greedy").get<std::vector<int>>();
    const generation reference = generate(model, logits, full, greedy.size(), -1);
    CHECK(reference.tokens == greedy);

    const auto tolerance = std::max(2.0, 0.005 * static_cast<double>(prompt.size()));
    for (std::size_t i = 0; i < policies.size(); ++i) {
      INFO(policies[i].name);
      const auto& numbers = expected.at("rules").at(policies[i].name);
      double kept = 0;
      for (std::size_t layer = 0; layer < results[i].size(); ++layer) {
        INFO("layer " << layer);
        const auto cuts = numbers.at("cuts").at(layer).is_array()
                              ? numbers.at("cuts").at(layer).get<std::vector<int>>()
                              : std::vector<int>{numbers.at("cuts").at(layer).get<int>()};
        REQUIRE(results[i][layer].kept.size() == cuts.size());
        for (std::size_t g = 0; g < cuts.size(); ++g) {
          CHECK(std::abs(results[i][layer].kept[g].cut - cuts[g]) <= tolerance);
        }
        kept += results[i][layer].kept_fraction() / static_cast<double>(results[i].size());
        CHECK(results[i][layer].bytes_after <= results[i][layer].bytes_before);
      }
      CHECK(std::abs(kept - numbers.at("kept_fraction").get<double>()) <= 0.003);

      pruned[i].advance(prompt.size());
      const comparison against = compare(reference, logits, [&](std::span<const int> known) {
        return model.score(known, pruned[i]);
      });
      const auto kl = numbers.at("kl_mean_nats").get<double>();
      CHECK(std::abs(against.mean_kl - kl) <= std::max(0.2 * kl, 0.002));
      WARN(name << ", " << policies[i].name << ": kept " << kept << " (golden "
                << numbers.at("kept_fraction") << "), KL " << against.mean_kl << " (golden " << kl
                << "), same top token " << against.same_top_token << " (golden "
                << numbers.at("same_top_token") << ")");
    }
  }
}
