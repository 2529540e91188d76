// SPDX-License-Identifier: Apache-2.0
// One cut for all layers: the oracle's on what llama.cpp shows, however it computes attention.
#include "pooled_cut.hpp"

#include <map>

#include "catch.hpp"
#include "loaded.hpp"
#include "reference.hpp"

using namespace llama_cpp;
using refreekv::index_t;

namespace {

constexpr std::size_t cells = 512;

index_t signed_size(std::size_t size) { return static_cast<index_t>(size); }

// As many heads as all layers have together.
reference::attention_rows rows_of_all_layers(const attention_tap& tap) {
  return {signed_size(tap.layers() * tap.q_heads()),
          signed_size(tap.rows()),
          signed_size(tap.tokens()),
          {}};
}

// What the softmax node showed.
reference::attention_rows shown_rows(const attention_tap& tap) {
  reference::attention_rows all = rows_of_all_layers(tap);
  for (std::size_t layer = 0; layer < tap.layers(); ++layer) {
    for (std::size_t head = 0; head < tap.q_heads(); ++head) {
      for (std::size_t row = 0; row < tap.rows(); ++row) {
        const float* first = tap.attention().data() +
                             ((layer * tap.rows() + row) * tap.q_heads() + head) * tap.tokens();
        all.values.insert(all.values.end(), first, first + tap.tokens());
      }
    }
  }
  return all;
}

std::vector<float> cached_keys(const ggml_tensor& cache, std::size_t tokens) {
  std::vector<float> keys(tokens * static_cast<std::size_t>(cache.ne[0]));
  if (cache.type == GGML_TYPE_F32) {
    ggml_backend_tensor_get(&cache, keys.data(), 0, keys.size() * sizeof(float));
  } else {
    std::vector<std::byte> stored(tokens * cache.nb[1]);
    ggml_backend_tensor_get(&cache, stored.data(), 0, stored.size());
    ggml_get_type_traits(cache.type)
        ->to_float(stored.data(), keys.data(), signed_size(keys.size()));
  }
  return keys;
}

// Attention in double precision from the queries and keys that the fused node showed.
reference::attention_rows computed_rows(const attention_tap& tap) {
  const index_t kv_heads = signed_size(tap.kv_heads()), dim = signed_size(tap.head_dim());
  const auto tokens = static_cast<position_t>(tap.tokens());
  problem p(kv_heads, signed_size(tap.q_heads()) / kv_heads, dim, signed_size(tap.rows()),
            std::vector<position_t>(tap.layers(), tokens));
  p.scale = tap.scale();
  p.queries = tap.queries();
  reference::attention_rows all = rows_of_all_layers(tap);
  for (index_t layer = 0; layer < p.sequences(); ++layer) {
    const auto keys = cached_keys(*tap.keys()[static_cast<std::size_t>(layer)], tap.tokens());
    for (index_t token = 0; token < tokens; ++token) {
      for (index_t head = 0; head < kv_heads; ++head) {
        const float* key = keys.data() + (token * kv_heads + head) * dim;
        for (index_t d = 0; d < dim; ++d) p.keys.at(layer, head, token, d) = key[d];
      }
    }
    const auto rows = reference::attend(p, layer);
    all.values.insert(all.values.end(), rows.values.begin(), rows.values.end());
  }
  return all;
}

const std::map<std::string, context_options>& ways() {
  static const std::map<std::string, context_options> all{
      {"softmax", {.keys = GGML_TYPE_F32, .values = GGML_TYPE_F32, .flash_attention = false}},
      {"flash, f16", {}},
      {"flash, f32", {.keys = GGML_TYPE_F32, .values = GGML_TYPE_F32}},
      {"flash, q8_0", {.keys = GGML_TYPE_Q8_0, .values = GGML_TYPE_Q8_0}}};
  return all;
}

// A prefill for each way; policies may use fewer of the rows.
const attention_tap& tap_of(const std::string& way) {
  static std::map<std::string, prefilled> prefills;
  if (!prefills.contains(way)) {
    context_options options = ways().at(way);
    options.threads = 2;
    prefills.try_emplace(way, loaded_model(), options, cells, first_tokens("definitions", 320),
                         std::size_t{8});
  }
  return prefills.at(way).tap;
}

const std::map<std::string, refreekv::policy::refreekv>& policies() {
  static const std::map<std::string, refreekv::policy::refreekv> all{
      {"the paper's, 16 sinks", {.sinks = 16}},
      {"15 %", {.threshold = 0.15, .sinks = 16}},
      {"8 rows", {.sinks = 16, .window = 8, .average = refreekv::row_average::frobenius}},
      {"8 rows, mean, sinks in the norm",
       {.threshold = 0.05, .window = 8, .norm = refreekv::norm_scope::full_row}}};
  return all;
}

}  // namespace

TEST_CASE("one cut for all layers is the oracle's, on rows and on keys of any type",
          "[pooled_cut]") {
  const attention_tap& rows_shown = tap_of("softmax");
  REQUIRE_FALSE(rows_shown.attention().empty());
  const auto softmax = shown_rows(rows_shown);
  for (const auto& [way, options] : ways()) {
    const attention_tap& tap = tap_of(way);
    REQUIRE(tap.layers() == loaded_model().layers() - 2);
    REQUIRE(tap.keys().empty() != options.flash_attention);
    const auto rows = options.flash_attention ? computed_rows(tap) : softmax;
    for (const auto& [name, policy] : policies()) {
      CAPTURE(way, name);
      const auto kept = pooled_cut(policy, tap, 1);
      CHECK(reference::disagreement(kept, reference::decide(rows, 0, rows.q_heads, policy),
                                    policy.threshold) == "");
      CHECK(kept.dropped() > 0);
      CHECK(pooled_cut(policy, tap, 2) == kept);

      // Each way computes attention with its own rounding: by llama.cpp's own rows its cut loses
      // what the policy allows, give or take that.
      const auto by_rows = reference::decide(softmax, 0, softmax.q_heads, policy);
      const double loss = by_rows.losses[static_cast<std::size_t>(kept.cut)];
      const double next = by_rows.losses[static_cast<std::size_t>(kept.cut) + 1];
      CHECK(loss <= policy.threshold * 1.05);
      CHECK(next >= policy.threshold * 0.95);
    }
  }
}

TEST_CASE("policies that score tokens, and cuts for each KV head, are refused", "[pooled_cut]") {
  using refreekv::policy::refreekv;
  const attention_tap& tap = tap_of("softmax");
  CHECK(why_unpoolable(refreekv{}) == nullptr);
  CHECK(why_unpoolable(::refreekv::policy::streaming_llm{}) == nullptr);
  CHECK(why_unpoolable(smollm2::keep_everything{}) == nullptr);
  CHECK(why_unpoolable(refreekv{.scope = ::refreekv::cut_scope::kv_head}) != nullptr);
  CHECK(why_unpoolable(::refreekv::policy::h2o{}) != nullptr);
  CHECK(why_unpoolable(::refreekv::policy::cake{}) != nullptr);
  CHECK_THROWS(pooled_cut(::refreekv::policy::snapkv{}, tap, 1));

  CHECK(pooled_cut(smollm2::keep_everything{}, tap, 1).dropped() == 0);
  CHECK(pooled_cut(::refreekv::policy::streaming_llm{.budget = 100}, tap, 1).length() == 100);
  CHECK(pooled_cut(refreekv{.full_layers = 30}, tap, 1).dropped() == 0);
  // A window of more rows than there are is one of all.
  const auto rows = static_cast<::refreekv::count_t>(tap.rows());
  CHECK(pooled_cut(refreekv{.window = rows + 1}, tap, 1) ==
        pooled_cut(refreekv{.window = rows}, tap, 1));
}
