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

// KV heads that are decided on together.
struct head_range {
  std::size_t first, count;
};

// All, or each alone where earlier decisions have left them different lengths.
std::vector<head_range> parts_of(const layer_cache& cache) {
  if (cache.head_stride()) return {{0, cache.kv_heads()}};
  std::vector<head_range> parts;
  for (std::size_t head = 0; head < cache.kv_heads(); ++head) parts.push_back({head, 1});
  return parts;
}

// first: the keys or the values of the first of these heads. [sequence = 1, kv_head, token,
// head_dim]
refreekv::dense<float> source_of(float* first, const layer_cache& cache, const head_range& heads) {
  const auto dim = static_cast<index_t>(cache.head_dim());
  return refreekv::dense(refreekv::view(
      first,
      {1, static_cast<index_t>(heads.count), static_cast<index_t>(cache.length(heads.first)), dim},
      {0, static_cast<index_t>(cache.head_stride().value_or(0)), dim, 1}));
}
refreekv::dense<float> keys_of(layer_cache& cache, const head_range& heads) {
  return source_of(cache.keys(heads.first), cache, heads);
}
refreekv::dense<float> values_of(layer_cache& cache, const head_range& heads) {
  return source_of(cache.values(heads.first), cache, heads);
}
head_range all_heads(const layer_cache& cache) { return {0, cache.kv_heads()}; }

// The last queries, [row, q_head, head_dim], and the keys of a layer.
auto observe_layer(std::size_t layer, std::span<const float> queries, std::size_t q_heads,
                   layer_cache& cache, const head_range& heads) {
  const auto dim = static_cast<index_t>(cache.head_dim());
  const auto row = static_cast<index_t>(q_heads) * dim;
  const std::size_t group = q_heads / cache.kv_heads();
  return refreekv::observe(refreekv::view(queries.data() + heads.first * group * cache.head_dim(),
                                          {1, static_cast<index_t>(queries.size()) / row,
                                           static_cast<index_t>(heads.count * group), dim},
                                          {0, row, dim, 1}),
                           keys_of(cache, heads), {.index = static_cast<index_t>(layer)});
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

// For a cache that earlier decisions have left the first slots.settled of: faithful, which drops a
// share of what it looks at, judges no token twice, and a share is one of all tokens ever seen.
pruning_policy after(pruning_policy policy, const pruned_slots& slots) {
  const auto of_all = [&](refreekv::token_budget& budget) {
    budget = budget.of(static_cast<index_t>(slots.seen));
  };
  std::visit(
      [&]<class Policy>(Policy& each) {
        if constexpr (valued_policy<Policy>) {
          each.sinks = std::max(each.sinks, static_cast<refreekv::count_t>(slots.settled));
        }
        if constexpr (requires { of_all(each.budget); }) of_all(each.budget);
        if constexpr (requires { of_all(each.recent); }) of_all(each.recent);
      },
      policy);
  return policy;
}

bool shares_a_cut(const pruning_policy& policy) {
  const auto* scan = std::get_if<refreekv::policy::refreekv>(&policy);
  return scan != nullptr && scan->scope == refreekv::cut_scope::layer;
}

}  // namespace

pruner::pruner(const pruning_policy& policy, std::size_t q_heads, int threads,
               std::vector<refreekv::token_range> keep)
    : policy_(policy),
      q_heads_(q_heads),
      threads_(threads),
      runner_(threads),
      keep_(std::move(keep)) {
  if (!keep_.empty() && !keeps_ranges(policy)) {
    throw std::runtime_error("protected tokens need a policy that keeps a range");
  }
}

pruner::pruner(const pruner& other)
    : policy_(other.policy_),
      q_heads_(other.q_heads_),
      threads_(other.threads_),
      runner_(other.threads_),
      keep_(other.keep_),
      left_(other.left_),
      slots_(other.slots_),
      cake_(other.cake_) {}

template <class F>
layer_pruning pruner::shrink(layer_cache& cache, const F& decide_and_compact) {
  const stopwatch watch;
  layer_pruning result{{}, {}, {}, cache.length(0), cache.bytes(), cache.bytes(), 0, 0};
  std::vector<slot_range> slots;  // [group]
  for (const head_range& heads : parts_of(cache)) {
    layer_pruning part{{}, {}, {}, cache.length(heads.first), 0, 0, 0, 0};
    const std::vector<slot_range> kept = decide_and_compact(heads, part);
    slots.insert(slots.end(), kept.begin(), kept.end());
    result.kept.insert(result.kept.end(), part.kept.begin(), part.kept.end());
    result.counts.insert(result.counts.end(), part.counts.begin(), part.counts.end());
    result.stand_ins.insert(result.stand_ins.end(), part.stand_ins.begin(), part.stand_ins.end());
  }
  result.library_seconds = watch.seconds();
  retain(slots, cache);
  result.bytes_after = cache.bytes();
  result.seconds = watch.seconds();
  return result;
}

layer_pruning pruner::prune(std::size_t layer, std::span<const float> queries, layer_cache& cache) {
  if (std::holds_alternative<keep_everything>(policy_)) {
    return {{}, {}, {}, cache.length(0), cache.bytes(), cache.bytes(), 0, 0};
  }
  if (!cache.head_stride() && shares_a_cut(policy_)) {
    throw std::runtime_error("heads that differ in length have no cut in common");
  }
  if (!keep_.empty()) {
    while (left_.size() <= layer) left_.emplace_back(cache.kv_heads());
    left_[layer].append(cache.length(0) - left_[layer].length(0));
  }
  while (slots_.size() <= layer) slots_.emplace_back(cache.kv_heads());
  std::vector<pruned_slots>& slots = slots_[layer];
  for (std::size_t head = 0; head < slots.size(); ++head) {
    slots[head].seen += cache.length(head) - slots[head].settled;
  }
  layer_pruning result = shrink(cache, [&](const head_range& heads, layer_pruning& part) {
    runner_.decide(after(policy_, slots[heads.first]),
                   observe_layer(layer, queries, q_heads_, cache, heads), values_of(cache, heads),
                   part);
    if (!keep_.empty()) protect(left_[layer], heads.first, heads.count, part.kept);
    return runner_.compact(part, keys_of(cache, heads), values_of(cache, heads));
  });
  for (std::size_t head = 0; head < slots.size(); ++head) slots[head].settled = cache.length(head);
  return result;
}

void pruner::protect(remaining_tokens& left, std::size_t first_head, std::size_t heads,
                     std::vector<refreekv::kept_range>& kept) const {
  const std::size_t group = heads / kept.size();  // heads of a decision
  for (std::size_t g = 0; g < kept.size(); ++g) {
    for (const refreekv::token_range& text : keep_) {
      const refreekv::token_range slots = left.slots_of(first_head + g * group, text);
      kept[g] = refreekv::protect(kept[g], slots.begin, slots.end);
    }
    for (std::size_t h = g * group; h < (g + 1) * group; ++h) left.drop(first_head + h, kept[g]);
  }
}

layer_pruning pruner::prune(std::size_t layer, std::span<const float> queries, kv_cache& cache) {
  const auto* cake = std::get_if<refreekv::policy::cake>(&policy_);
  return cake == nullptr ? prune(layer, queries, cache.layer(layer))
                         : cascade(*cake, layer, queries, cache);
}

layer_pruning pruner::cascade(const refreekv::policy::cake& policy, std::size_t layer,
                              std::span<const float> queries, kv_cache& cache) {
  layer_cache& newest = cache.layer(layer);
  const auto heads = static_cast<index_t>(newest.kv_heads());
  if (layer == 0) cake_ = {static_cast<refreekv::position_t>(newest.length(0)), {}, {}};
  const index_t tokens = cake_.tokens;
  if (static_cast<index_t>(newest.length(0)) != tokens) {
    throw std::runtime_error(
        "cake shares its budget among layers as long as the first: prune once");
  }
  cake_.scores.emplace_back(newest.kv_heads() * newest.length(0));
  cake_.preferences.push_back(0);
  const auto finished = static_cast<index_t>(cake_.preferences.size());

  const auto evict = [&](std::size_t index, const auto& model_layer) {
    float* scores = cake_.scores[index].data();
    const refreekv::cake_layers<> layers{refreekv::view(scores, {1, heads, tokens}),
                                         refreekv::view(cake_.preferences.data(), {1, finished}),
                                         static_cast<refreekv::count_t>(finished),
                                         refreekv::lengths_view<>(&cake_.tokens, {1})};
    // They move with their tokens.
    const refreekv::dense scores_of_tokens(
        refreekv::view(scores, {1, heads, model_layer.tokens(0), 1}, {0, tokens, 1, 1}));
    layer_cache& shrinking = cache.layer(index);
    return shrink(shrinking, [&](const head_range& range, layer_pruning& part) {
      runner_.decide(policy, refreekv::with_layers(model_layer, layers), part);
      return runner_.compact(part, keys_of(shrinking, range), values_of(shrinking, range),
                             scores_of_tokens);
    });
  };
  layer_pruning result =
      evict(layer, observe_layer(layer, queries, q_heads_, newest, all_heads(newest)));
  for (std::size_t earlier = 0; earlier < layer; ++earlier) {
    layer_cache& older = cache.layer(earlier);
    const auto eviction =
        evict(earlier, refreekv::observe(keys_of(older, all_heads(older)),
                                         {.index = static_cast<index_t>(earlier)}));
    result.seconds += eviction.seconds;
    result.library_seconds += eviction.library_seconds;
  }
  return result;
}

std::vector<curve_point> pruner::loss_curve(std::size_t layer, std::span<const float> queries,
                                            layer_cache& cache) {
  auto* policy = std::get_if<refreekv::policy::refreekv>(&policy_);
  if (policy == nullptr) throw std::runtime_error("only refreekv has a loss curve to plot");
  refreekv::policy::refreekv probe = *policy;
  probe.scope = refreekv::cut_scope::layer;
  probe.full_layers = 0;
  const auto model_layer = observe_layer(layer, queries, q_heads_, cache, all_heads(cache));
  std::vector<curve_point> curve;
  for (double exponent = -4; exponent <= 0; exponent += 0.02) {
    probe.threshold = std::min(1.0, std::pow(10, exponent));
    layer_pruning result{};
    runner_.decide(probe, model_layer, result);
    curve.push_back({result.kept.front().cut, result.kept.front().loss});
  }
  return curve;
}

}  // namespace smollm2
