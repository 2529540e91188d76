// SPDX-License-Identifier: Apache-2.0
// A pruned sequence in a smaller context predicts what masked tokens do, and memory has gone back.
#include "catch.hpp"
#include "divergence.hpp"
#include "greedy.hpp"
#include "loaded.hpp"
#include "loaded_model.hpp"
#include "pruning.hpp"
#include "resident_memory.hpp"

using namespace llama_cpp;

namespace {

constexpr std::size_t threads = 2, sinks = 4;
using all_logits = std::vector<std::vector<float>>;

// Half of them are dropped, whatever a policy would say.
std::vector<llama_token> prompt() { return first_tokens("definitions", 320); }

std::size_t cut_of(const std::vector<llama_token>& tokens) { return tokens.size() / 2; }
std::size_t kept_of(const std::vector<llama_token>& tokens) {
  return sinks + tokens.size() - cut_of(tokens);
}

void drop_half(const std::vector<llama_token>& tokens, context& of) {
  of.remove(sinks, static_cast<llama_pos>(cut_of(tokens)));
}

// The sequence without them, in a context of its own; in `cache` they are masked from then on.
context halved(const std::vector<llama_token>& tokens, context& cache) {
  drop_half(tokens, cache);
  context smaller(cache.in(), cache.options(), kept_of(tokens) + 64);
  smaller.restore(cache.save());
  return smaller;
}

smollm2::decode_step steps_of(context& cache) {
  return [&cache](int token) { return cache.decode(std::span(&token, 1)); };
}

all_logits predictions(const smollm2::decode_step& decode, std::span<const int> tokens) {
  all_logits result;
  for (const int token : tokens) result.push_back(decode(token));
  return result;
}

// The weights in F32, for as long as the test runs.
struct f32_model_file {
  std::filesystem::path path = std::filesystem::current_path() / "llama_cpp_tests.F32.gguf";

  f32_model_file() {
    (void)loaded_model();  // llama.cpp is quiet from then on
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = LLAMA_FTYPE_ALL_F32;
    params.allow_requantize = true;
    params.nthread = threads;
    REQUIRE(llama_model_quantize(model_path().c_str(), path.c_str(), &params) == 0);
  }
  f32_model_file(const f32_model_file&) = delete;
  ~f32_model_file() { std::filesystem::remove(path); }
};

// Another engine, in which all layers lose what they lose in llama.cpp, the first ones included.
struct other_engine {
  smollm2::loaded_model loaded = smollm2::load_model(model_path(), threads);
  smollm2::kv_cache cache = loaded.network.new_cache();

  explicit other_engine(const std::vector<llama_token>& tokens) {
    smollm2::pruner prune(
        refreekv::policy::streaming_llm{.sinks = sinks,
                                        .budget = static_cast<refreekv::count_t>(kept_of(tokens))},
        loaded.network.config().q_heads, threads);
    smollm2::prefill_hooks hooks;
    hooks.on_layer = [&](std::size_t layer, std::span<const float> queries,
                         smollm2::kv_cache& filled) {
      const auto result = prune.prune(layer, queries, filled.layer(layer));
      REQUIRE(static_cast<std::size_t>(result.kept.front().cut) == cut_of(tokens));
    };
    loaded.network.prefill(tokens, cache, hooks);
  }

  smollm2::decode_step steps() {
    return [this](int token) { return loaded.network.decode(token, cache); };
  }
};

}  // namespace

TEST_CASE("a sequence in a smaller context predicts what it did with masked tokens", "[sequence]") {
  const auto tokens = prompt();
  const auto end = static_cast<llama_pos>(tokens.size());
  other_engine other(tokens);
  std::vector<int> answer;  // to the whole prompt, before the cut
  all_logits others;
  for (const bool flash_attention : {true, false}) {
    CAPTURE(flash_attention);
    prefilled p(loaded_model(), {.flash_attention = flash_attention, .threads = threads}, 1024,
                tokens);
    if (answer.empty()) {
      answer = smollm2::generate(steps_of(p.cache), p.logits, 24, -1).tokens;
      others = predictions(other.steps(), answer);
      p.cache.remove(end, -1);
    }
    const all_logits whole = predictions(steps_of(p.cache), answer);
    p.cache.remove(end, -1);

    context smaller = halved(tokens, p.cache);
    CHECK(smaller.cells() == 256);
    CHECK(p.cache.next_position() == end);
    CHECK(smaller.next_position() == end);
    const all_logits masked = predictions(steps_of(p.cache), answer);
    const all_logits moved = predictions(steps_of(smaller), answer);
    CHECK(smollm2::compare_logits(masked, moved).mean_kl < 5e-3);
    CHECK(smollm2::compare_logits(others, moved).mean_kl < 5e-3);
    CHECK(smollm2::compare_logits(whole, moved).mean_kl > 5e-2);  // the cut is seen
  }
}

TEST_CASE("in F32, 64 of 64 tokens are those with masked tokens, and another engine's",
          "[sequence]") {
  const f32_model_file file;
  const model f32(file.path);
  const auto tokens = prompt();
  prefilled p(f32,
              {.keys = GGML_TYPE_F32,
               .values = GGML_TYPE_F32,
               .flash_attention = false,
               .threads = threads},
              1024, tokens);
  context smaller = halved(tokens, p.cache);
  const auto masked = smollm2::generate(steps_of(p.cache), p.logits, 64, -1);
  const auto moved = smollm2::generate(steps_of(smaller), p.logits, 64, -1);
  const auto others = smollm2::generate(other_engine(tokens).steps(), p.logits, 64, -1);
  CHECK(moved.tokens.size() == 64);
  CHECK(moved.tokens == masked.tokens);
  CHECK(moved.tokens == others.tokens);
  CHECK(smollm2::compare_logits(masked.logits, moved.logits).largest_kl < 1e-6);
  CHECK(smollm2::compare_logits(others.logits, moved.logits).largest_kl < 1e-6);
}

// In a process of its own: what others have freed is not always the operating system's again.
TEST_CASE("all memory but that of what stays goes back", "[memory]") {
  const auto tokens = prompt();
  prefilled p(loaded_model(), {.threads = threads}, 8192, tokens);
  const std::size_t cell = p.tap.cache_bytes() / p.cache.cells();
  // 30 layers of 3 heads of 64 keys and values in f16.
  REQUIRE(cell == 30 * 3 * 64 * 2 * 2);
  const auto resident = [] { return static_cast<double>(smollm2::resident_bytes()); };
  const double before = resident();
  drop_half(tokens, p.cache);
  CHECK(before - resident() < static_cast<double>(cell));  // nothing yet
  p.cache = shrink(std::move(p.cache), kept_of(tokens) + 64);
  CHECK(p.cache.cells() == 256);
  CHECK(before - resident() > 0.95 * static_cast<double>((8192 - 256) * cell));
}

TEST_CASE("what cannot be is refused in words", "[sequence]") {
  using Catch::Contains;
  const auto tokens = first_tokens("definitions", 300);
  prefilled p(loaded_model(), {.threads = threads}, 512, tokens);
  CHECK_THROWS_WITH(p.cache.decode(tokens),
                    Contains("no room for token 300") && Contains("512 cells"));
  CHECK_THROWS_WITH(
      context(loaded_model(), {.values = GGML_TYPE_Q8_0, .flash_attention = false}, 256),
      Contains("requires flash_attn"));
  const auto saved = p.cache.save();
  CHECK_THROWS_WITH(context(loaded_model(), {}, 256).restore(saved), Contains("not enough cells"));
  CHECK_THROWS_WITH(context(loaded_model(), {.keys = GGML_TYPE_F32}, 512).restore(saved),
                    Contains("mismatched key type"));
  CHECK_THROWS_WITH(context(loaded_model(), {.flash_attention = false}, 512).restore(saved),
                    Contains("incompatible V transposition"));
  context other(loaded_model(), {}, 512);
  other.restore(saved);
  CHECK(other.next_position() == 300);
}
