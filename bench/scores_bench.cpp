// SPDX-License-Identifier: Apache-2.0
// What the decisions of policies that attend with several query rows cost, on one layer.
//
// A row is scores/policy/model/keys. roofline is the time divided by that of the slower limit:
// reading the keys once, or one multiply-add of floats for each query row, key and dimension.
#include <string>

#include "alternate.hpp"
#include "decision_memory.hpp"
#include "limits.hpp"

namespace {

using namespace bench;
using namespace refreekv;

/// The memory of CAKE's cascade, of which the measured layer is the last.
class cake_memory {
 public:
  explicit cake_memory(const cache_shape& shape)
      : shape_(shape), scores_(static_cast<std::size_t>(shape.kv_heads * shape.capacity)) {}
  template <class Layer>
  auto with_layers(const Layer& layer) {
    return refreekv::with_layers(
        layer, cake_layers<>{{scores_.data(), {1, shape_.kv_heads, shape_.capacity}},
                             {preferences_.data(), {1, layers}},
                             layers,
                             {&prompt_, {1}}});
  }
  static constexpr count_t layers = 3;

 private:
  cache_shape shape_;
  std::vector<float> scores_;
  std::array<double, layers> preferences_{1, 1};
  position_t prompt_ = static_cast<position_t>(shape_.capacity);
};

template <class T, class Policy>
void select_layer(benchmark::State& state, const geometry& g, const Policy& policy,
                  index_t window) {
  const synthetic_layer<T> layer(g, state.range(0), state.range(0), window);
  const thread_pool pool(static_cast<int>(state.range(1)));
  const cpu_backend<const thread_pool&> cpu{pool};
  cake_memory cake(layer.keys().shape());
  const auto seen = [&] {
    if constexpr (std::same_as<Policy, policy::cake>) {
      return cake.with_layers(layer_for(policy, layer));
    } else {
      return layer_for(policy, layer);
    }
  }();
  auto decision = decision_of_layer(policy, layer);
  std::vector<std::byte> scratch(workspace_size(policy, cpu, seen));
  const auto [time, read, fma] = alternate(
      state, [] {},
      [&] {
        const status s = select(policy, cpu, seen, decision.kept(), scratch);
        if (s != status::ok) state.SkipWithError(to_string(s));
      },
      [&] { benchmark::DoNotOptimize(read_keys(pool, layer.key_bytes())); },
      [&] {
        benchmark::DoNotOptimize(fma_peak(pool, window * g.q_heads * layer.tokens() * g.head_dim));
      });
  state.counters["GB/s"] = static_cast<double>(layer.key_bytes().size()) * 1e-9 / time;
  state.counters["read_us"] = read * 1e6;
  state.counters["fma_us"] = fma * 1e6;
  state.counters["roofline"] = time / std::max(read, fma);
  state.counters["kept"] = decision.fraction();
  state.counters["workspace"] = static_cast<double>(scratch.size());
}

template <class T, class Policy>
void add(const char* name, const char* type, const Policy& policy, index_t window) {
  for (const geometry& g : {geometries.front(), geometries.back()}) {
    const std::string row = std::string("scores/") + name + "/" + g.name + "/" + type;
    benchmark::RegisterBenchmark(row.c_str(),
                                 [=](auto& state) { select_layer<T>(state, g, policy, window); })
        ->ArgNames({"tokens", "threads"})
        ->ArgsProduct({{1024, 8192, 32768}, {1, 2}})
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
  }
}

template <class T>
void add_policies(const char* type) {
  const token_budget half = token_budget::share(0.5);
  add<T>("refreekv_16_rows", type,
         policy::refreekv{.window = 16, .average = row_average::frobenius}, 16);
  add<T>("h2o_8_rows", type, policy::h2o{.budget = half, .recent = 8, .window = 8}, 8);
  add<T>("pyramidkv", type, policy::pyramidkv{.budget = half, .layers = 32}, 8);
  add<T>("snapkv", type, policy::snapkv{.budget = half}, 32);
  add<T>("attention_ranked", type, policy::attention_ranked{}, 8);
  add<T>("tova", type, policy::tova{.budget = half}, 1);
  add<T>("twilight_once", type, policy::twilight{}, 1);
  add<T>("cake", type, policy::cake{.budget = half, .layers = cake_memory::layers}, 32);
  add<T>("faithful", type, policy::faithful{}, 32);
}

const bool added = [] {
  add_policies<Eigen::bfloat16>("bf16");
  add_policies<float>("fp32");
  return true;
}();

}  // namespace
