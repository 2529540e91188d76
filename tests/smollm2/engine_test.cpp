// SPDX-License-Identifier: Apache-2.0
// The real model: tokens, greedy answers and the loss of pruned caches equal the golden ones.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "llama.hpp"
#include "tokenizer.hpp"

using namespace smollm2;

namespace {

constexpr std::size_t sinks = 4;

std::string environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : otherwise;
}

// CTest reports exit code 77 as "skipped" (SKIP_RETURN_CODE), so that an absent model is not
// mistaken for a passed test.
std::string model_path() {
  const std::string path = environment("REFREEKV_MODEL", "");
  if (path.empty()) {
    std::cerr << "REFREEKV_MODEL names no model file: skipped\n";
    std::exit(77);
  }
  return path;
}

std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

const nlohmann::json& golden() {
  static const auto json = nlohmann::json::parse(
      read_text(environment("REFREEKV_GOLDEN", REFREEKV_GOLDEN_DIR) + "/smollm2.json"));
  return json;
}

std::string prompt_text(const std::string& name) {
  return read_text(REFREEKV_PROMPTS_DIR "/" + name + ".txt");
}

struct loaded_model {
  tokenizer tokens;
  llama network;
};

const loaded_model& model() {
  static const loaded_model loaded = [] {
    const gguf_file file(model_path());
    return loaded_model{tokenizer(file), llama(file, 2)};
  }();
  return loaded;
}

struct prefilled {
  kv_cache cache;
  std::vector<float> logits;
};

prefilled prefill(std::span<const int> tokens) {
  kv_cache cache = model().network.new_cache();
  std::vector<float> logits = model().network.prefill(tokens, cache);
  return {std::move(cache), std::move(logits)};
}

/// Of a golden prompt: several tests go on from it.
const prefilled& prefilled_golden(const std::string& name) {
  static std::map<std::string, prefilled> all;
  auto at = all.find(name);
  if (at == all.end()) {
    const auto tokens = golden().at(name).at("token_ids").get<std::vector<int>>();
    at = all.emplace(name, prefill(tokens)).first;
  }
  return at->second;
}

int best(const std::vector<float>& logits) {
  return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

std::vector<double> log_probabilities(const std::vector<float>& logits) {
  const double largest = logits[static_cast<std::size_t>(best(logits))];
  double total = 0;
  for (const float logit : logits) total += std::exp(logit - largest);
  std::vector<double> result;
  for (const float logit : logits) result.push_back(logit - largest - std::log(total));
  return result;
}

// KL(full || pruned) in nats.
double divergence(const std::vector<float>& full, const std::vector<float>& pruned) {
  const std::vector<double> p = log_probabilities(full);
  const std::vector<double> q = log_probabilities(pruned);
  double sum = 0;
  for (std::size_t i = 0; i < p.size(); ++i) sum += std::exp(p[i]) * (p[i] - q[i]);
  return sum;
}

// Keeps slots [0, sinks) and [cut, length) of every KV head. Slot order does not matter to
// attention, so the sinks move up to the cut, and what is kept is one range.
void prune(layer_cache& layer, const nlohmann::json& cut) {
  std::vector<std::size_t> first;
  std::vector<std::size_t> length;
  for (std::size_t head = 0; head < layer.kv_heads(); ++head) {
    const auto position = (cut.is_array() ? cut[head] : cut).get<std::size_t>();
    first.push_back(position - sinks);
    length.push_back(layer.length(head) - first.back());
    for (float* rows : {layer.keys(head), layer.values(head)}) {
      std::copy_backward(rows, rows + sinks * layer.head_dim(), rows + position * layer.head_dim());
    }
  }
  layer.retain(first, length);
}

}  // namespace

TEST_CASE("the chat's tokens are the golden ones") {
  for (const auto& [name, expected] : golden().items()) {
    CAPTURE(name);
    const auto token_ids = expected.at("token_ids").get<std::vector<int>>();
    CHECK(model().tokens.encode_chat(prompt_text(name)) == token_ids);
  }
}

TEST_CASE("text survives a round trip through the model's vocabulary") {
  for (const char* text : {"", " ", "\r\n\t x", "don't I'LL we've", "3.14159e-10",
                           "naïve ΩMEGA 日本語 🦜🏽‍♀️", "<|im_end|>", "a\xe2\x82",
                           "a\u00a0b\u2003c\u0085d", "    int main() { return 0; }\n"}) {
    CAPTURE(text);
    CHECK(model().tokens.decode(model().tokens.encode(text)) == text);
  }
  CHECK(model().tokens.encode("<|im_end|>").size() > 1);
}

TEST_CASE("the whole cache answers with the golden tokens") {
  for (const auto& [name, expected] : golden().items()) {
    CAPTURE(name);
    auto [cache, logits] = prefilled_golden(name);
    const auto greedy = expected.at("greedy").get<std::vector<int>>();
    std::vector<int> answer;
    while (answer.size() < greedy.size()) {
      answer.push_back(best(logits));
      logits = model().network.decode(answer.back(), cache);
    }
    CHECK(answer == greedy);
  }
}

TEST_CASE("decoding the end of a prompt equals prefilling all of it") {
  const auto tokens = golden().at("eggs").at("token_ids").get<std::vector<int>>();
  auto [cache, logits] = prefill(std::span(tokens).first(40));
  for (const int token : std::span(tokens).subspan(40)) {
    logits = model().network.decode(token, cache);
  }
  CHECK(divergence(prefill(tokens).logits, logits) < 1e-6);
}

TEST_CASE("caches cut as the golden rules say lose what the golden data say") {
  for (const auto& [name, expected] : golden().items()) {
    const kv_cache& full = prefilled_golden(name).cache;
    const auto greedy = expected.at("greedy").get<std::vector<int>>();
    std::vector<std::vector<float>> references;
    kv_cache cache = full;
    for (const int token : greedy) references.push_back(model().network.decode(token, cache));
    for (const auto& [policy, numbers] : expected.at("rules").items()) {
      CAPTURE(name, policy);
      kv_cache pruned = full;
      for (std::size_t layer = 0; layer < pruned.layers(); ++layer) {
        prune(pruned.layer(layer), numbers.at("cuts").at(layer));
      }
      double sum = 0;
      double same = 0;
      for (std::size_t i = 0; i < greedy.size(); ++i) {
        const auto logits = model().network.decode(greedy[i], pruned);
        sum += divergence(references[i], logits);
        same += best(references[i]) == best(logits);
      }
      const auto steps = static_cast<double>(greedy.size());
      CHECK(sum / steps == Approx(numbers.at("kl_mean_nats").get<double>()).epsilon(0.02));
      CHECK(same / steps == Approx(numbers.at("same_top_token").get<double>()).margin(0.0006));
    }
  }
}
