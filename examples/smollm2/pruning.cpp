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

template <class Rule>
concept decides_on_ranges = std::same_as<refreekv::decision_of<Rule, refreekv::host_memory>,
                                         refreekv::kept_ranges<refreekv::host_memory>>;

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

void require_ok(refreekv::status status) {
  if (status != refreekv::status::ok) {
    throw std::runtime_error(std::string("pruning failed: ") + refreekv::to_string(status));
  }
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

// Keeps the slots where compaction left what stays.
template <class Kept>
void retain(const std::vector<Kept>& kept, refreekv::compaction how, layer_cache& cache) {
  std::vector<std::size_t> first, length;  // [kv_head]
  for (std::size_t head = 0; head < cache.kv_heads(); ++head) {
    const Kept& group = kept[kept.size() == 1 ? 0 : head];
    first.push_back(static_cast<std::size_t>(refreekv::first_slot(group, how)));
    length.push_back(static_cast<std::size_t>(group.length()));
  }
  cache.retain(first, length);
}

template <class Kept>
double mean_kept_fraction(const std::vector<Kept>& kept) {
  double sum = 0;
  for (const Kept& each : kept) sum += each.kept_fraction();
  return sum / static_cast<double>(kept.size());
}

}  // namespace

const char* why_invalid(const pruning_rule& rule) {
  return std::visit(
      [](const auto& r) -> const char* {
        if constexpr (std::same_as<decltype(r), const keep_everything&>) {
          return nullptr;
        } else {
          return r.invalid();
        }
      },
      rule);
}

std::size_t window_of(const pruning_rule& rule) {
  return std::visit(
      [](const auto& r) -> std::size_t {
        if constexpr (requires { r.window; }) {
          return r.window;
        } else {
          return 1;
        }
      },
      rule);
}

void set_layers(pruning_rule& rule, std::size_t layers) {
  std::visit(
      [&](auto& r) {
        if constexpr (requires { r.layers; }) r.layers = static_cast<refreekv::count_t>(layers);
      },
      rule);
}

double layer_pruning::kept_fraction() const {
  if (!kept.empty()) return mean_kept_fraction(kept);
  return counts.empty() ? 1 : mean_kept_fraction(counts);
}

refreekv::kept_positions<> pruner::positions_of(layer_pruning& result) {
  const auto heads = static_cast<index_t>(result.counts.size());
  const auto tokens = static_cast<index_t>(result.tokens);
  return {refreekv::view(positions_.data(), {1, heads, tokens}),
          refreekv::view(result.counts.data(), {1, heads})};
}

template <class Rule, class Seen>
void pruner::decide(const Rule& rule, const Seen& seen, layer_pruning& result) {
  const refreekv::cpu_backend backend{pool_};
  const index_t groups = refreekv::groups_of(rule, seen);
  scratch_.resize(std::max(scratch_.size(), refreekv::workspace_size(rule, backend, seen)));
  if constexpr (decides_on_ranges<Rule>) {
    result.kept.resize(static_cast<std::size_t>(groups));
    require_ok(refreekv::select(rule, backend, seen, {result.kept.data(), {1, groups}}, scratch_));
  } else {
    result.counts.resize(static_cast<std::size_t>(groups));
    positions_.resize(std::max(positions_.size(), result.counts.size() * result.tokens));
    require_ok(refreekv::select(rule, backend, seen, positions_of(result), scratch_));
  }
}

template <class Rule, class Seen, class... Others>
layer_pruning pruner::apply(const Rule& rule, const Seen& seen, layer_cache& cache,
                            const Others&... others) {
  const stopwatch watch;
  layer_pruning result{{}, {}, cache.length(0), cache.bytes(), cache.bytes(), 0, 0};
  decide(rule, seen, result);

  const refreekv::cpu_backend backend{pool_};
  const auto keys = source_of(cache.keys(0), cache), values = source_of(cache.values(0), cache);
  if constexpr (decides_on_ranges<Rule>) {
    constexpr auto how = refreekv::compaction::sinks_up;
    const auto groups = static_cast<index_t>(result.kept.size());
    const refreekv::view<const refreekv::kept_range, 2> kept(result.kept.data(), {1, groups});
    require_ok(refreekv::compact(backend, kept, how, keys, values, others...));
    result.library_seconds = watch.seconds();
    retain(result.kept, how, cache);
  } else {
    constexpr auto how = refreekv::compaction::suffix_down;
    require_ok(refreekv::compact(backend, positions_of(result), how, keys, values, others...));
    result.library_seconds = watch.seconds();
    retain(result.counts, how, cache);
  }
  result.bytes_after = cache.bytes();
  result.seconds = watch.seconds();
  return result;
}

layer_pruning pruner::prune(std::size_t layer, std::span<const float> queries, layer_cache& cache) {
  return std::visit(
      [&](const auto& rule) -> layer_pruning {
        if constexpr (std::same_as<decltype(rule), const keep_everything&>) {
          return {{}, {}, cache.length(0), cache.bytes(), cache.bytes(), 0, 0};
        } else if constexpr (std::same_as<decltype(rule), const refreekv::policy::cake&>) {
          throw std::runtime_error("cake shares its budget among layers: it needs all of them");
        } else {
          return apply(rule, observe_layer(layer, queries, window_of(rule_), cache), cache);
        }
      },
      rule_);
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
    decide(probe, seen, result);
    curve.push_back({result.kept.front().cut, result.kept.front().loss});
  }
  return curve;
}

}  // namespace smollm2
