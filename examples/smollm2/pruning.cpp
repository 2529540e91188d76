// SPDX-License-Identifier: Apache-2.0
#include "pruning.hpp"

#include <chrono>
#include <cmath>
#include <stdexcept>
#include <string>

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

void require_ok(refreekv::status status) {
  if (status != refreekv::status::ok) {
    throw std::runtime_error(std::string("pruning failed: ") + refreekv::to_string(status));
  }
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
  const auto* refreekv = std::get_if<refreekv::policy::refreekv>(&rule);
  return refreekv == nullptr ? 1 : refreekv->window;
}

double layer_pruning::kept_fraction() const {
  if (kept.empty()) return 1;
  double sum = 0;
  for (const refreekv::kept_range& range : kept) sum += range.kept_fraction();
  return sum / static_cast<double>(kept.size());
}

template <class Rule>
std::vector<refreekv::kept_range> pruner::select(const Rule& rule, std::size_t layer,
                                                 std::span<const float> queries,
                                                 layer_cache& cache) {
  const refreekv::cpu_backend backend{pool_};
  const refreekv::dense<float> keys = source_of(cache.keys(0), cache);
  const auto dim = static_cast<index_t>(cache.head_dim());
  const auto rows = static_cast<index_t>(std::min(window_of(rule_), cache.length(0)));
  const index_t q_heads = static_cast<index_t>(queries.size()) / (rows * dim);
  const auto seen = refreekv::observe(refreekv::view(queries.data(), {1, rows, q_heads, dim}), keys,
                                      {.layer = static_cast<index_t>(layer)});
  scratch_.resize(std::max(scratch_.size(), refreekv::workspace_size(rule, backend, seen)));
  std::vector<refreekv::kept_range> kept(static_cast<std::size_t>(rule.groups(seen)));
  require_ok(
      refreekv::select(rule, backend, seen, {kept.data(), {1, rule.groups(seen)}}, scratch_));
  return kept;
}

layer_pruning pruner::prune(std::size_t layer, std::span<const float> queries, layer_cache& cache) {
  const auto start = std::chrono::steady_clock::now();
  layer_pruning result{{}, cache.length(0), cache.bytes(), cache.bytes(), 0};
  std::visit(
      [&](const auto& rule) {
        if constexpr (!std::same_as<decltype(rule), const keep_everything&>) {
          result.kept = select(rule, layer, queries, cache);
        }
      },
      rule_);
  if (!result.kept.empty()) {
    const auto groups = static_cast<index_t>(result.kept.size());
    constexpr auto how = refreekv::compaction::sinks_up;
    require_ok(refreekv::compact(
        refreekv::cpu_backend{pool_},
        refreekv::view<const refreekv::kept_range, 2>(result.kept.data(), {1, groups}), how,
        source_of(cache.keys(0), cache), source_of(cache.values(0), cache)));
    std::vector<std::size_t> first, length;  // [kv_head]
    for (std::size_t head = 0; head < cache.kv_heads(); ++head) {
      const refreekv::kept_range& kept = result.kept[groups == 1 ? 0 : head];
      first.push_back(static_cast<std::size_t>(refreekv::first_slot(kept, how)));
      length.push_back(static_cast<std::size_t>(kept.length()));
    }
    cache.retain(first, length);
    result.bytes_after = cache.bytes();
  }
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

std::vector<curve_point> pruner::loss_curve(std::size_t layer, std::span<const float> queries,
                                            layer_cache& cache) {
  auto* rule = std::get_if<refreekv::policy::refreekv>(&rule_);
  if (rule == nullptr) throw std::runtime_error("only refreekv has a loss curve to plot");
  refreekv::policy::refreekv probe = *rule;
  probe.scope = refreekv::cut_scope::layer;
  probe.full_layers = 0;
  std::vector<curve_point> curve;
  for (double exponent = -4; exponent <= 0; exponent += 0.02) {
    probe.threshold = std::min(1.0, std::pow(10, exponent));
    const refreekv::kept_range kept = select(probe, layer, queries, cache).front();
    curve.push_back({kept.cut, kept.loss});
  }
  return curve;
}

}  // namespace smollm2
