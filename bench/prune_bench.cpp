// SPDX-License-Identifier: Apache-2.0
// What deciding and pruning cost, against the machine's limits in alternating runs.
//
// A row is work/model/keys/cache: cache is "hot" where runs follow each other and "cold" where the
// keys are flushed from all caches before each. roofline is the time divided by that of the slower
// limit: reading the keys once, or as many multiply-adds of floats as there are between queries and
// keys. (AVX512_BF16 does two where floats do one.)
#include <benchmark/benchmark.h>

#include <stdexcept>
#include <string>

#include "alternate.hpp"
#include "eigen_peer.hpp"
#include "limits.hpp"
#include "packed_layer.hpp"
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace {

using namespace bench;

/// Takes the keys out of all caches.
void flush([[maybe_unused]] std::span<const std::byte> keys) {
#if defined(__x86_64__)
  for (std::size_t i = 0; i < keys.size(); i += 64) _mm_clflush(&keys[i]);
  _mm_mfence();
#endif
}

/// The policy with the memory it works in.
template <class Layer>
class decision {
 public:
  decision(const refreekv::thread_pool& pool, const Layer& layer)
      : cpu_{pool}, layer_(layer), scratch_(refreekv::workspace_size(policy_, cpu_, layer)) {}

  void select() { check(refreekv::select(policy_, cpu_, layer_, cuts(), scratch_)); }
  template <class Values>
  void prune(const Values& values) {
    check(refreekv::prune(policy_, cpu_, layer_, cuts(), scratch_, refreekv::compaction::sinks_up,
                          values));
  }
  const refreekv::kept_range& kept() const { return kept_; }
  std::size_t workspace() const { return scratch_.size(); }

 private:
  refreekv::view<refreekv::kept_range, 2> cuts() { return {&kept_, {1, 1}}; }
  static void check(refreekv::status status) {
    if (status != refreekv::status::ok) throw std::runtime_error(refreekv::to_string(status));
  }

  refreekv::policy::refreekv policy_;
  refreekv::cpu_backend<const refreekv::thread_pool&> cpu_;
  Layer layer_;
  std::vector<std::byte> scratch_;
  refreekv::kept_range kept_{};
};

enum class cache { hot, cold };

/// The decision alone.
template <class T>
void select_layer(benchmark::State& state, const geometry& g, cache keys) {
  const synthetic_layer<T> layer(g, state.range(0));
  const refreekv::thread_pool pool(static_cast<int>(state.range(1)));
  decision policy(pool, layer.model_layer(layer.keys()));
  const auto [time, read, fma] = alternate(
      state,
      [&] {
        if (keys == cache::cold) flush(layer.key_bytes());
      },
      [&] { policy.select(); },
      [&] { benchmark::DoNotOptimize(read_keys(pool, layer.key_bytes())); },
      [&] { benchmark::DoNotOptimize(fma_peak(pool, g.q_heads * layer.tokens() * g.head_dim)); });
  const double gigabytes = static_cast<double>(layer.key_bytes().size()) * 1e-9;
  state.counters["GB/s"] = gigabytes / time;
  state.counters["read_GB/s"] = gigabytes / read;
  state.counters["roofline_us"] = std::max(read, fma) * 1e6;
  state.counters["fma_us"] = fma * 1e6;
  state.counters["roofline"] = time / std::max(read, fma);
  state.counters["read"] = time / read;
  state.counters["kept"] = policy.kept().kept_fraction();
  state.counters["workspace"] =
      static_cast<double>(policy.workspace()) / static_cast<double>(2 * layer.key_bytes().size());
}

/// Deciding and compacting keys and values, against deciding.
template <class T>
void prune_layer(benchmark::State& state, const geometry& g) {
  const synthetic_layer<T> layer(g, state.range(0), state.range(0));
  const refreekv::thread_pool pool(static_cast<int>(state.range(1)));
  decision policy(pool, layer.model_layer(layer.keys()));
  const auto [prune, select] =
      alternate(state, [] {}, [&] { policy.prune(layer.values()); }, [&] { policy.select(); });
  state.counters["prune/select"] = prune / select;
}

/// Pages of 16 tokens, against the same number of tokens in a row.
template <class T>
void select_pages(benchmark::State& state, const geometry& g) {
  synthetic_layer<T> layer(g, state.range(0));
  const refreekv::thread_pool pool(static_cast<int>(state.range(1)));
  decision paged(pool, layer.model_layer(layer.pages()));
  decision dense(pool, layer.model_layer(layer.keys()));
  const auto [paged_time, dense_time] =
      alternate(state, [] {}, [&] { paged.select(); }, [&] { dense.select(); });
  state.counters["paged/dense"] = paged_time / dense_time;
}

/// Eigen alone, on one thread, against the decision.
template <class T>
void eigen_peer(benchmark::State& state, const geometry& g) {
  const synthetic_layer<T> layer(g, state.range(0));
  const refreekv::thread_pool pool(1);
  decision policy(pool, layer.model_layer(layer.keys()));
  index_t cut = 0;
  const auto [eigen, select] =
      alternate(state, [] {}, [&] { cut = eigen_cut(layer); }, [&] { policy.select(); });
  if (cut != policy.kept().cut) state.SkipWithError("the peer decides differently");
  state.counters["eigen/select"] = eigen / select;
}

/// Keys in 8 or 4 bits, against the same number of keys in bfloat16. read: the time divided by that
/// of reading the packed keys once.
template <class Packed>
void select_packed(benchmark::State& state, const geometry& g) {
  const synthetic_layer<Eigen::bfloat16> plain(g, state.range(0));
  const Packed layer(g, state.range(0));
  const refreekv::thread_pool pool(static_cast<int>(state.range(1)));
  decision packed(pool, plain.model_layer(layer.keys()));
  decision bf16(pool, plain.model_layer(plain.keys()));
  const auto [time, bf16_time, read] = alternate(
      state, [] {}, [&] { packed.select(); }, [&] { bf16.select(); },
      [&] { benchmark::DoNotOptimize(read_keys(pool, layer.key_bytes())); });
  state.counters["GB/s"] = static_cast<double>(layer.key_bytes().size()) * 1e-9 / time;
  state.counters["packed/bf16"] = time / bf16_time;
  state.counters["read"] = time / read;
  state.counters["kept"] = packed.kept().kept_fraction();
}

template <class Packed>
void add_packed(const char* type) {
  for (const geometry& g : {geometries.front(), geometries.back()}) {
    const std::string name = std::string("select_packed/") + g.name + "/" + type;
    benchmark::RegisterBenchmark(name.c_str(),
                                 [g](auto& state) { select_packed<Packed>(state, g); })
        ->ArgNames({"tokens", "threads"})
        ->ArgsProduct({{1024, 8192, 32768}, {1, 2}})
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
  }
}

template <class T>
void add(const char* type) {
  const auto row = [&](const char* work, const geometry& g, const char* cache, auto f) {
    const std::string name = std::string(work) + "/" + g.name + "/" + type + cache;
    return benchmark::RegisterBenchmark(name.c_str(), f)
        ->ArgNames({"tokens", "threads"})
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
  };
  for (const geometry& g : geometries) {
    row("select", g, "/hot", [&](auto& state) {
      select_layer<T>(state, g, cache::hot);
    })->ArgsProduct({{1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072}, {1, 2}});
    if (&g == geometries.data()) {
      row("select", g, "/hot", [&](auto& state) { select_layer<T>(state, g, cache::hot); })
          ->ArgsProduct({{262144, 524288, 1048576}, {1, 2}})
          ->Iterations(11);  // filling such layers takes longer than measuring them
    }
    row("select", g, "/cold", [&](auto& state) {
      select_layer<T>(state, g, cache::cold);
    })->ArgsProduct({{8192}, {1, 2}});
    row("prune", g, "/hot", [&](auto& state) {
      prune_layer<T>(state, g);
    })->ArgsProduct({{8192, 131072}, {1, 2}});
    row("paged16", g, "/hot", [&](auto& state) {
      select_pages<T>(state, g);
    })->ArgsProduct({{8192, 131072}, {1, 2}});
    row("eigen", g, "/hot", [&](auto& state) {
      eigen_peer<T>(state, g);
    })->ArgsProduct({{8192, 131072}, {1}});
  }
}

const bool added = [] {
  add<Eigen::bfloat16>("bf16");
  add<Eigen::half>("fp16");
  add<float>("fp32");
  add_packed<scaled_layer<std::int8_t>>("int8");
  add_packed<scaled_layer<refreekv::fp8_e4m3_bits>>("fp8");
  add_packed<block_layer<refreekv::q8_0_block>>("q8_0");
  add_packed<block_layer<refreekv::q4_0_block>>("q4_0");
  add_packed<int4_layer>("int4");
  return true;
}();

}  // namespace
