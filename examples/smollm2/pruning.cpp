// SPDX-License-Identifier: Apache-2.0
#include "pruning.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "stopwatch.hpp"

namespace smollm2 {

namespace {

using refreekv::index_t;

// keys or values of all heads: [sequence = 1, kv_head, token, head_dim]
refreekv::dense<float> source_of(float* first, const layer_cache& cache) {
  const auto stride = cache.head_stride();
  if (!stride) throw std::runtime_error("a layer is pruned once: its heads differ in length");
  const auto dim = static_cast<index_t>(cache.head_dim());
  return refreekv::dense(refreekv::view(
      first,
      {1, static_cast<index_t>(cache.kv_heads()), static_cast<index_t>(cache.length(0)), dim},
      {0, static_cast<index_t>(*stride), dim, 1}));
}

// The last queries and the keys of a layer.
auto observe_layer(std::size_t layer, std::span<const float> queries, std::size_t window,
                   layer_cache& cache) {
  const auto dim = static_cast<index_t>(cache.head_dim());
  const auto rows = static_cast<index_t>(std::min(window, cache.length(0)));
  const index_t q_heads = static_cast<index_t>(queries.size()) / (rows * dim);
  return refreekv::observe(refreekv::view(queries.data(), {1, rows, q_heads, dim}),
                           source_of(cache.keys(0), cache), {.layer = static_cast<index_t>(layer)});
}

// Keeps the slots where compaction left what stays, [group].
void retain(const std::vector<slot_range>& slots, layer_cache& cache) {
  std::vector<std::size_t> first, length;  // [kv_head]
  for (std::size_t head = 0; head < cache.kv_heads(); ++head) {
    const slot_range& group = slots[slots.size() == 1 ? 0 : head];
    first.push_back(group.first);
    length.push_back(group.length);
  }
  cache.retain(first, length);
}

}  // namespace

template <class Rule, class Seen, class... Others>
layer_pruning pruner::apply(const Rule& rule, const Seen& seen, layer_cache& cache,
                            const Others&... others) {
  const stopwatch watch;
  layer_pruning result{{}, {}, cache.length(0), cache.bytes(), cache.bytes(), 0, 0};
  runner_.decide(rule, seen, result);
  const auto slots = runner_.compact(result, source_of(cache.keys(0), cache),
                                     source_of(cache.values(0), cache), others...);
  result.library_seconds = watch.seconds();
  retain(slots, cache);
  result.bytes_after = cache.bytes();
  result.seconds = watch.seconds();
  return result;
}

layer_pruning pruner::prune(std::size_t layer, std::span<const float> queries, layer_cache& cache) {
  if (std::holds_alternative<keep_everything>(rule_)) {
    return {{}, {}, cache.length(0), cache.bytes(), cache.bytes(), 0, 0};
  }
  return apply(rule_, observe_layer(layer, queries, window_of(rule_), cache), cache);
}

layer_pruning pruner::prune(std::size_t layer, std::span<const float> queries, kv_cache& cache) {
  const auto* cake = std::get_if<refreekv::policy::cake>(&rule_);
  return cake == nullptr ? prune(layer, queries, cache.layer(layer))
                         : cascade(*cake, layer, queries, cache);
}

layer_pruning pruner::cascade(const refreekv::policy::cake& rule, std::size_t layer,
                              std::span<const float> queries, kv_cache& cache) {
  layer_cache& newest = cache.layer(layer);
  const auto heads = static_cast<index_t>(newest.kv_heads());
  if (layer == 0) cake_ = {static_cast<refreekv::position_t>(newest.length(0)), {}, {}};
  const index_t tokens = cake_.tokens;
  cake_.scores.emplace_back(newest.kv_heads() * newest.length(0));
  cake_.preferences.push_back(0);
  const auto finished = static_cast<index_t>(cake_.preferences.size());

  const auto evict = [&](std::size_t which, const auto& seen) {
    float* scores = cake_.scores[which].data();
    const refreekv::cake_layers<> layers{refreekv::view(scores, {1, heads, tokens}),
                                         refreekv::view(cake_.preferences.data(), {1, finished}),
                                         static_cast<refreekv::count_t>(finished),
                                         refreekv::lengths_view<>(&cake_.tokens, {1})};
    // They move with their tokens.
    const refreekv::dense scores_of_tokens(
        refreekv::view(scores, {1, heads, seen.tokens(0), 1}, {0, tokens, 1, 1}));
    return apply(rule, refreekv::with_layers(seen, layers), cache.layer(which), scores_of_tokens);
  };
  layer_pruning result = evict(layer, observe_layer(layer, queries, rule.window, newest));
  for (std::size_t earlier = 0; earlier < layer; ++earlier) {
    layer_cache& older = cache.layer(earlier);
    const auto again = evict(earlier, refreekv::observe(source_of(older.keys(0), older),
                                                        {.layer = static_cast<index_t>(earlier)}));
    result.seconds += again.seconds;
    result.library_seconds += again.library_seconds;
  }
  return result;
}

std::vector<curve_point> pruner::loss_curve(std::size_t layer, std::span<const float> queries,
                                            layer_cache& cache) {
  auto* rule = std::get_if<refreekv::policy::refreekv>(&rule_);
  if (rule == nullptr) throw std::runtime_error("only refreekv has a loss curve to plot");
  refreekv::policy::refreekv probe = *rule;
  probe.scope = refreekv::cut_scope::layer;
  probe.full_layers = 0;
  const auto seen = observe_layer(layer, queries, probe.window, cache);
  std::vector<curve_point> curve;
  for (double exponent = -4; exponent <= 0; exponent += 0.02) {
    probe.threshold = std::min(1.0, std::pow(10, exponent));
    layer_pruning result{};
    runner_.decide(probe, seen, result);
    curve.push_back({result.kept.front().cut, result.kept.front().loss});
  }
  return curve;
}

}  // namespace smollm2
