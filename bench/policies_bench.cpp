// SPDX-License-Identifier: Apache-2.0
// What every policy costs on all layers of a model after a prompt: table 3 of arXiv 2502.16886.
//
// A row is table3/policy/model. It decides and compacts keys and values of every layer in turn, in
// bf16. The layers of a model share the memory of 16, which no cache holds. Budgets are half of the
// prompt; what has none keeps what it keeps.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

#include "decision_memory.hpp"
#include "median.hpp"

namespace {

using namespace bench;
using namespace refreekv;
using element = Eigen::bfloat16;

/// Adds the time that something takes.
template <class F>
void timed(double& seconds, const F& f) {
  const auto start = std::chrono::steady_clock::now();
  const status s = f();
  seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (s != status::ok) throw std::runtime_error(to_string(s));
}

/// Memory of a model's layers and of the decisions about them.
struct model {
  static constexpr index_t in_memory = 16;

  model(const geometry& g, index_t layer_count, index_t tokens, index_t window, int threads)
      : layers(layer_count), pool(threads), cpu{pool} {
    for (index_t l = 0; l < std::min(in_memory, layer_count); ++l) {
      memory.push_back(std::make_unique<synthetic_layer<element>>(g, tokens, tokens, window));
    }
  }
  const synthetic_layer<element>& at(index_t l) const {
    return *memory[static_cast<std::size_t>(l % in_memory)];
  }

  index_t layers;
  thread_pool pool;
  cpu_backend<const thread_pool&> cpu;
  std::vector<std::unique_ptr<synthetic_layer<element>>> memory;
};

template <class Layer>
Layer at_layer(Layer layer, index_t l) {
  layer.info.index = l;
  return layer;
}

struct cost {
  double select = 0, compact = 0, fraction = 0;
};

/// All layers, each on its own.
template <class Policy>
class one_by_one {
 public:
  one_by_one(const model& m, const Policy& policy)
      : model_(m),
        policy_(policy),
        decision_(decision_of_layer(policy, m.at(0))),
        scratch_(workspace_size(policy, m.cpu, layer_for(policy, m.at(0)))) {}

  std::size_t workspace() const { return scratch_.size(); }

  cost run() {
    cost total;
    for (index_t l = 0; l < model_.layers; ++l) {
      const synthetic_layer<element>& layer = model_.at(l);
      timed(total.select, [&] {
        return select(policy_, model_.cpu, at_layer(layer_for(policy_, layer), l), decision_.kept(),
                      scratch_);
      });
      timed(total.compact, [&] {
        return compact(model_.cpu, decision_.decided(), compaction::sinks_up, layer.keys(),
                       layer.values());
      });
      total.fraction += decision_.fraction() / static_cast<double>(model_.layers);
    }
    return total;
  }

 private:
  const model& model_;
  Policy policy_;
  decision_memory<decision_of<Policy, host_memory>> decision_;
  std::vector<std::byte> scratch_;
};

/// CAKE's cascade: after each layer all layers before it give up what they have too much.
class cascade {
 public:
  explicit cascade(const model& m)
      : model_(m),
        policy_{.budget = token_budget::share(0.5), .layers = static_cast<count_t>(m.layers)},
        kv_heads_(m.at(0).shape().kv_heads),
        tokens_(m.at(0).tokens()),
        preferences_(static_cast<std::size_t>(m.layers)),
        lengths_(static_cast<std::size_t>(m.layers)),
        prompt_(static_cast<position_t>(tokens_)),
        decision_(kv_heads_, tokens_) {
    for (index_t l = 0; l < m.layers; ++l) {
      scores_.emplace_back(static_cast<std::size_t>(kv_heads_ * tokens_));
    }
  }

  cost run() {
    cost total;
    std::fill(lengths_.begin(), lengths_.end(), prompt_);
    for (index_t l = 0; l < model_.layers; ++l) {
      const synthetic_layer<element>& fresh = model_.at(l);
      decide(total, l, with_layers(at_layer(fresh.model_layer(fresh.keys()), l), state(l, l + 1)));
      for (index_t earlier = 0; earlier < l; ++earlier) {
        const auto keys = source<element>(model_.at(earlier).keys().run_at(0, 0, 0).data, earlier,
                                          model_.at(earlier).shape().head_dim);
        decide(total, earlier,
               with_layers(observe(keys, {.index = earlier}), state(earlier, l + 1)));
      }
    }
    for (const position_t length : lengths_) {
      total.fraction += static_cast<double>(length) / static_cast<double>(tokens_ * model_.layers);
    }
    return total;
  }

 private:
  cake_layers<> state(index_t l, index_t finished) {
    return {{scores_[static_cast<std::size_t>(l)].data(), {1, kv_heads_, tokens_}},
            {preferences_.data(), {1, model_.layers}},
            static_cast<count_t>(finished),
            {&prompt_, {1}}};
  }
  /// [1, kv_head, token, dim] of which the layer's length is in use.
  template <class T>
  dense<T> source(T* data, index_t l, index_t dim) const {
    return dense<T>(view<T, 4>(data, {1, kv_heads_, tokens_, dim}),
                    {&lengths_[static_cast<std::size_t>(l)], {1}});
  }
  template <class Layer>
  void decide(cost& total, index_t l, const Layer& layer) {
    timed(total.select, [&] {
      scratch_.resize(std::max(scratch_.size(), workspace_size(policy_, model_.cpu, layer)));
      return select(policy_, model_.cpu, layer, decision_.kept(), scratch_);
    });
    const synthetic_layer<element>& tensors = model_.at(l);
    const index_t dim = tensors.shape().head_dim;
    timed(total.compact, [&] {
      return compact(model_.cpu, decision_.kept(), compaction::suffix_down,
                     source(tensors.keys().run_at(0, 0, 0).data, l, dim),
                     source(tensors.values().run_at(0, 0, 0).data, l, dim),
                     source(scores_[static_cast<std::size_t>(l)].data(), l, 1));
    });
    lengths_[static_cast<std::size_t>(l)] = decision_.kept().counts(0, 0).count;
  }

  const model& model_;
  policy::cake policy_;
  index_t kv_heads_, tokens_;
  std::vector<double> preferences_;
  std::vector<position_t> lengths_;
  position_t prompt_;
  decision_memory<kept_positions<>> decision_;
  std::vector<std::vector<float>> scores_;
  std::vector<std::byte> scratch_;
};

template <class Work>
void measure(benchmark::State& state, const model& m, Work&& work) {
  std::vector<double> select, compact;
  double fraction = 0;
  for (auto _ : state) {
    const cost c = work.run();
    state.SetIterationTime(c.select + c.compact);
    select.push_back(c.select);
    compact.push_back(c.compact);
    fraction = c.fraction;
  }
  state.counters["select_ms"] = 1e3 * median(select);
  state.counters["compact_ms"] = 1e3 * median(compact);
  state.counters["layers"] = static_cast<double>(m.layers);
  state.counters["kept"] = fraction;
  if constexpr (requires { work.workspace(); }) {
    state.counters["workspace"] = static_cast<double>(work.workspace());
  }
}

template <class Policy>
void add(const char* name, const Policy& policy, index_t window, const geometry& g, index_t layers,
         std::vector<std::int64_t> tokens) {
  const std::string row = std::string("table3/") + name + "/" + g.name;
  benchmark::RegisterBenchmark(row.c_str(),
                               [=](benchmark::State& state) {
                                 const model m(g, layers, state.range(0),
                                               window == 0 ? state.range(0) : window,
                                               static_cast<int>(state.range(1)));
                                 if constexpr (std::same_as<Policy, policy::cake>) {
                                   measure(state, m, cascade(m));
                                 } else {
                                   measure(state, m, one_by_one(m, policy));
                                 }
                               })
      ->ArgNames({"tokens", "threads"})
      ->ArgsProduct({std::move(tokens), {2}})
      ->Iterations(3)  // filling the memory takes longer than most of them
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

const bool added = [] {
  const token_budget half = token_budget::share(0.5);
  for (const geometry& g : {geometries[0], geometries[1]}) {
    const index_t layers = g.layers;
    const std::vector<std::int64_t> all{1024, 8192, 32768};
    add("refreekv", policy::refreekv{}, 1, g, layers, all);
    add("refreekv_16_rows", policy::refreekv{.window = 16, .average = row_average::frobenius}, 16,
        g, layers, all);
    add("streaming_llm", policy::streaming_llm{.budget = half}, 1, g, layers, all);
    add("h2o_8_rows", policy::h2o{.budget = half, .recent = 8, .window = 8}, 8, g, layers, all);
    add("snapkv", policy::snapkv{.budget = half}, 32, g, layers, all);
    add("ada_snapkv", policy::snapkv{.budget = half, .head_floor = 0.2}, 32, g, layers, all);
    add("faithful", policy::faithful{}, 32, g, layers, all);
    add("faithful_no_error", policy::faithful{.tolerance = 0.2, .error_term = false}, 32, g, layers,
        all);
    add("faithful_no_stand_ins", policy::faithful{.tolerance = 0.16, .stand_ins = false}, 32, g,
        layers, all);
    add("pyramidkv", policy::pyramidkv{.budget = half, .layers = static_cast<count_t>(layers)}, 8,
        g, layers, all);
    add("cake", policy::cake{}, 32, g, layers, all);
    add("tova", policy::tova{.budget = half}, 1, g, layers, all);
    add("attention_ranked", policy::attention_ranked{}, 8, g, layers, all);
    add("twilight_once", policy::twilight{}, 1, g, layers, all);
    // Quadratic in the prompt, like attention: one layer, a prompt of 8,192 tokens at most.
    add("h2o_all_rows", policy::h2o{.budget = half, .recent = 8}, 0, g, 1, {1024, 8192});
  }
  return true;
}();

}  // namespace
