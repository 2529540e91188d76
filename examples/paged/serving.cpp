// SPDX-License-Identifier: Apache-2.0
#include "serving.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <unordered_set>

#include "divergence.hpp"

namespace paged {
namespace {

using smollm2::llama;
using tokens_view = std::span<const int>;
using report_progress = std::function<void(double)>;

// A sequence, and the logits after its prompt and after each token that it decoded.
struct running {
  paged_cache cache;
  std::vector<int> tokens;
  std::vector<std::vector<float>> logits;

  void decode(const llama& model) {
    tokens.push_back(smollm2::top_token(logits.back()));
    logits.push_back(model.decode(tokens.back(), cache));
  }
};

running admit(page_pool& pool, std::size_t layers, std::size_t tokens,
              const paged_cache* prefix = nullptr) {
  auto cache = paged_cache::admit(pool, layers, tokens, prefix);
  if (!cache) {
    throw std::runtime_error(std::to_string(tokens) + " tokens in " + std::to_string(layers) +
                             " layers do not fit into " +
                             std::to_string(pool.manager.free_blocks()) + " free pages");
  }
  return {std::move(*cache), {}, {}};
}

// Whole pages that two prompts begin with, in tokens; each keeps at least one for itself.
std::size_t common_tokens(tokens_view a, tokens_view b, std::size_t page_tokens) {
  const std::size_t longest = std::max(std::min(a.size(), b.size()), std::size_t{1}) - 1;
  const auto first = a.begin(), last = first + static_cast<std::ptrdiff_t>(longest);
  const auto same = std::mismatch(first, last, b.begin()).first - first;
  return static_cast<std::size_t>(same) / page_tokens * page_tokens;
}

std::size_t checksum(const page_pool& pool, const std::vector<block_id>& pages) {
  std::size_t sum = 14695981039346656037u;  // FNV-1a
  for (const block_id page : pages) {
    for (const std::byte byte : pool.bytes_of(page)) {
      sum = (sum ^ static_cast<std::size_t>(byte)) * 1099511628211u;
    }
  }
  return sum;
}

std::vector<block_id> pages_of(const paged_cache& cache) {
  std::vector<block_id> pages;
  for (std::size_t layer = 0; layer < cache.layers(); ++layer) {
    const std::vector<block_id>& table = cache.layer(layer).table();
    pages.insert(pages.end(), table.begin(), table.end());
  }
  return pages;
}

// The same tokens in a pool of their own, where the prefix is computed first, too, and the prompt
// is pruned by the same policy, if any: how far the logits are from those that were served.
double difference_alone(const llama& model, const page_shape& page, tokens_view prompt,
                        std::size_t shared, const page_policy* policy, const running& served_run,
                        const report_progress& on_progress) {
  const std::size_t layers = model.config().layers;
  const std::size_t tokens = prompt.size() + served_run.tokens.size();
  page_pool pool(page, layers * page.pages_for(tokens));
  running prefix = admit(pool, layers, shared);
  if (shared > 0) model.prefill(prompt.first(shared), prefix.cache);
  running alone = admit(pool, layers, tokens, &prefix.cache);
  std::vector<page_release> releases;
  smollm2::prefill_hooks_for<paged_cache> hooks;
  if (policy != nullptr) hooks = pruning_hooks(*policy, model.config().q_heads, releases);
  hooks.on_progress = on_progress;
  alone.logits.push_back(model.prefill(prompt.subspan(shared), alone.cache, hooks));
  for (const int token : served_run.tokens) {
    alone.logits.push_back(model.decode(token, alone.cache));
  }

  double largest = 0;
  for (std::size_t step = 0; step < alone.logits.size(); ++step) {
    for (std::size_t i = 0; i < alone.logits[step].size(); ++i) {
      const double difference = std::abs(alone.logits[step][i] - served_run.logits[step][i]);
      if (!(difference <= largest)) largest = difference;  // NaN, too
    }
  }
  return largest;
}

}  // namespace

std::size_t serving_result::promised() const {
  std::size_t pages = 0;
  for (const page_release& each : releases) pages += each.promised;
  return pages * page.bytes();
}

std::size_t serving_result::returned() const {
  std::size_t pages = 0;
  for (const page_release& each : releases) pages += each.returned.size();
  return pages * page.bytes();
}

const char* serving_result::wrong() const {
  constexpr double tolerance = 1e-5;
  if (promised() != returned() || (free_after - free_before) * page.bytes() != returned()) {
    return "the bytes that came back are not those that were promised";
  }
  if (returned_to_c != c.pages) return "C has pages that A did not return";
  if (!shared_pages_unchanged) return "a shared page was written";
  for (const served* each : {&a, &b, &c}) {
    if (!(each->difference <= tolerance)) return "logits differ from those in a pool of its own";
  }
  return nullptr;
}

serving_result serve(const llama& model, const serving_plan& plan, const progress& on_progress) {
  const auto show = [&](const char* phase) {
    return [&on_progress, phase](double fraction) {
      if (on_progress) on_progress(phase, fraction);
    };
  };
  const std::size_t layers = model.config().layers;
  const tokens_view a = plan.a, b = plan.b, c = plan.c;
  serving_result result{};
  result.page = {plan.page_tokens, model.config().kv_heads, model.config().head_dim};
  result.shared_tokens = common_tokens(a, b, plan.page_tokens);
  if (result.shared_tokens == 0) throw std::runtime_error("A and B share no whole page");
  const auto pages = [&](std::size_t tokens) { return layers * result.page.pages_for(tokens); };
  result.shared_pages = pages(result.shared_tokens);
  result.pool_pages =
      pages(a.size() + plan.steps) + pages(b.size() + plan.steps) - result.shared_pages;
  page_pool pool(result.page, result.pool_pages);
  const auto free_pages = [&] { return pool.manager.free_blocks(); };

  auto prefix = std::make_unique<running>(admit(pool, layers, result.shared_tokens));
  model.prefill(a.first(result.shared_tokens), prefix->cache,
                {.on_progress = show("the shared prefix")});
  const std::vector<block_id> shared_pages = pages_of(prefix->cache);
  const std::size_t sum = checksum(pool, shared_pages);
  running run_a = admit(pool, layers, a.size() + plan.steps, &prefix->cache);
  running run_b = admit(pool, layers, b.size() + plan.steps, &prefix->cache);
  prefix.reset();
  result.free_before = free_pages();

  const std::size_t steps_of_c = plan.steps - plan.steps / 2;
  result.needed_by_c = pages(c.size() + steps_of_c);
  if (paged_cache::admit(pool, layers, c.size() + steps_of_c)) {
    throw std::logic_error("C was admitted although the pool is full");
  }

  run_b.logits.push_back(model.prefill(b.subspan(result.shared_tokens), run_b.cache,
                                       {.on_progress = show("prefill of B")}));
  auto pruning = pruning_hooks(plan.policy, model.config().q_heads, result.releases);
  pruning.on_progress = show("prefill of A");
  run_a.logits.push_back(model.prefill(a.subspan(result.shared_tokens), run_a.cache, pruning));
  result.free_after = free_pages();

  std::optional<running> run_c;
  for (std::size_t step = 0; step < plan.steps; ++step) {
    if (step == plan.steps / 2) {
      run_c = admit(pool, layers, c.size() + steps_of_c);
      run_c->logits.push_back(
          model.prefill(c, run_c->cache, {.on_progress = show("prefill of C")}));
    }
    run_a.decode(model);
    run_b.decode(model);
    if (run_c) run_c->decode(model);
  }
  result.free_at_end = free_pages();
  result.shared_pages_unchanged = checksum(pool, shared_pages) == sum;
  std::unordered_set<block_id> returned;
  for (const page_release& each : result.releases) {
    returned.insert(each.returned.begin(), each.returned.end());
  }
  for (const block_id page : pages_of(run_c->cache)) result.returned_to_c += returned.count(page);

  const auto summary = [&](const running& run, tokens_view prompt, std::size_t shared,
                           const page_policy* policy, const char* phase) {
    return served{prompt.size(), run.cache.pages(), run.tokens,
                  difference_alone(model, result.page, prompt, shared, policy, run, show(phase))};
  };
  result.a = summary(run_a, a, result.shared_tokens, &plan.policy, "A alone");
  result.b = summary(run_b, b, result.shared_tokens, nullptr, "B alone");
  result.c = summary(*run_c, c, 0, nullptr, "C alone");
  return result;
}

}  // namespace paged
