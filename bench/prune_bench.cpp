// SPDX-License-Identifier: Apache-2.0
// What deciding and pruning cost, against reading the keys once in alternating runs.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <string>

#include "geometry.hpp"
#include "read_keys.hpp"

namespace {

using namespace bench;

template <class F>
double seconds_of(const F& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double>& times) {
  const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

/// Alternates `work` with a plain read of the keys; reports GB/s of both and the ratio of their
/// median times.
template <class Work>
void against_read_keys(benchmark::State& state, refreekv::thread_pool& pool, const std::byte* keys,
                       std::size_t bytes, const Work& work) {
  std::vector<double> work_times, read_times;
  for (auto _ : state) {
    read_times.push_back(
        seconds_of([&] { benchmark::DoNotOptimize(read_keys(pool, keys, bytes)); }));
    work_times.push_back(seconds_of(work));
    benchmark::ClobberMemory();
    state.SetIterationTime(work_times.back());
  }
  const double gigabytes = static_cast<double>(bytes) * 1e-9;
  const double work_time = median(work_times), read_time = median(read_times);
  state.counters["GB/s"] = gigabytes / work_time;
  state.counters["read_GB/s"] = gigabytes / read_time;
  state.counters["ratio"] = work_time / read_time;
}

template <class T>
void read_keys_alone(benchmark::State& state, const geometry& g) {
  layer<T> one(g, state.range(0));
  refreekv::thread_pool pool(static_cast<int>(state.range(1)));
  against_read_keys(state, pool, one.key_bytes(), one.bytes(), [&] {
    benchmark::DoNotOptimize(read_keys(pool, one.key_bytes(), one.bytes()));
  });
}

/// The decision alone, or with the compaction of keys and values.
template <class T, bool compacts>
void prune_layer(benchmark::State& state, const geometry& g) {
  layer<T> one(g, state.range(0));
  refreekv::thread_pool pool(static_cast<int>(state.range(1)));
  const refreekv::cpu_backend cpu{pool};
  const refreekv::policy::refreekv rule;
  const auto seen = one.seen();
  std::vector<std::byte> scratch(refreekv::workspace_size(rule, cpu, seen));
  refreekv::kept_range kept;
  const refreekv::view<refreekv::kept_range, 2> cuts(&kept, {1, 1});
  refreekv::status status{};
  against_read_keys(state, pool, one.key_bytes(), one.bytes(), [&] {
    if constexpr (compacts) {
      status = refreekv::prune(rule, cpu, seen, cuts, scratch, refreekv::compaction::sinks_up,
                               one.values());
    } else {
      status = refreekv::select(rule, cpu, seen, cuts, scratch);
    }
  });
  if (status != refreekv::status::ok) state.SkipWithError(refreekv::to_string(status));
  state.counters["kept"] = kept.kept_fraction();
}

template <class T>
void add(const char* type) {
  for (const geometry& g : geometries) {
    const auto name = [&](const char* what) {
      return std::string(what) + "/" + g.name + "/" + type;
    };
    for (auto* row :
         {benchmark::RegisterBenchmark(name("read_keys").c_str(), read_keys_alone<T>, g),
          benchmark::RegisterBenchmark(name("select").c_str(), prune_layer<T, false>, g),
          benchmark::RegisterBenchmark(name("prune").c_str(), prune_layer<T, true>, g)}) {
      row->ArgNames({"tokens", "threads"})
          ->ArgsProduct({{2048, 8192, 32768, 131072}, {1, 2}})
          ->UseManualTime()
          ->Unit(benchmark::kMicrosecond);
    }
  }
}

const bool added = [] {
  add<Eigen::bfloat16>("bf16");
  add<Eigen::half>("fp16");
  add<float>("fp32");
  return true;
}();

}  // namespace
