// SPDX-License-Identifier: Apache-2.0
// Where std::size_t has 32 bits and counts have 64: policies stay within the workspace that they
// ask for, and sizes saturate. Needs no test framework, which a cross compiler may not have.
#undef NDEBUG
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "refreekv/refreekv.hpp"

using namespace refreekv;

namespace {

constexpr std::size_t largest = static_cast<std::size_t>(-1);
static_assert(sizeof(std::size_t) < sizeof(index_t));

void check(bool holds, const char* what, const char* policy = "") {
  if (holds) return;
  std::printf("%s %s\n", policy, what);
  std::exit(1);
}

constexpr index_t sequences = 2, kv_heads = 2, heads = 6, window = 3, head_dim = 20, tokens = 700;
constexpr index_t layers = 10;

/// Selects in exactly as many bytes as are asked for, between others.
template <class Policy, class Backend, class Layer>
void check_workspace(const char* name, const Policy& policy, const Backend& exec,
                     const Layer& layer) {
  const std::size_t bytes = workspace_size(policy, exec, layer), margin = 4096;
  check(bytes > 0 && bytes < 16 << 20, "asks for another workspace", name);
  std::vector<std::byte> memory(bytes + 2 * margin, std::byte{0xA5});
  const workspace<> scratch{memory.data() + margin, bytes},
      small{memory.data() + margin, bytes - 1};
  std::vector<position_t> positions(sequences * kv_heads * tokens);
  std::vector<kept_tokens> counts(sequences * kv_heads);
  std::vector<kept_range> ranges(sequences);
  const auto kept = [&] {
    if constexpr (std::same_as<decision_of<Policy, host_memory>, kept_ranges<>>) {
      return kept_ranges<>{ranges.data(), {sequences, 1}};
    } else {
      return kept_positions<>{{positions.data(), {sequences, kv_heads, tokens}},
                              {counts.data(), {sequences, kv_heads}}};
    }
  }();
  check(select(policy, exec, layer, kept, small) == status::small_workspace, "takes less", name);
  check(select(policy, exec, layer, kept, scratch) == status::ok, "does not select", name);
  index_t dropped = 0;
  for (const kept_tokens& k : counts) dropped += k.dropped();
  for (const kept_range& k : ranges) dropped += k.dropped();
  check(dropped > 0, "drops nothing", name);
  for (std::size_t i = 0; i < margin; ++i) {
    check(memory[i] == std::byte{0xA5}, "writes before its workspace", name);
    check(memory[margin + bytes + i] == std::byte{0xA5}, "writes past its workspace", name);
  }
}

template <class Backend>
void check_policies(const Backend& exec) {
  std::vector<float> keys(sequences * kv_heads * tokens * head_dim);
  std::vector<float> queries(sequences * window * heads * head_dim);
  unsigned state = 1;
  for (std::vector<float>* values : {&keys, &queries}) {
    for (float& v : *values) {
      state = state * 1664525u + 1013904223u;
      v = static_cast<float>(state >> 16) / 16384 - 2;
    }
  }
  const auto layer =
      observe(view(queries.data(), {sequences, window, heads, head_dim}),
              dense(view(keys.data(), {sequences, kv_heads, tokens, head_dim})), {.index = 7});
  std::vector<float> scores(sequences * kv_heads * tokens);
  std::vector<double> preferences(sequences * layers);
  const cake_layers<> carried{{scores.data(), {sequences, kv_heads, tokens}},
                              {preferences.data(), {sequences, layers}},
                              layers};
  check_workspace("refreekv", policy::refreekv{.threshold = 0.1, .window = 3}, exec, layer);
  check_workspace("h2o", policy::h2o{.budget = 60, .window = 3}, exec, layer);
  check_workspace("snapkv", policy::snapkv{.budget = 60, .window = 3}, exec, layer);
  check_workspace("pyramidkv", policy::pyramidkv{.budget = 60, .window = 3}, exec, layer);
  check_workspace("cake", policy::cake{.budget = 60, .window = 3, .layers = layers}, exec,
                  with_layers(layer, carried));
  check_workspace("tova", policy::tova{.budget = 60}, exec, layer);
  check_workspace("attention_ranked", policy::attention_ranked{.threshold = 0.1, .window = 3}, exec,
                  layer);
  check_workspace("twilight", policy::twilight{.mass = 0.5}, exec, layer);
  std::vector<float> values(keys);
  check_workspace(
      "faithful", policy::faithful{.tolerance = 0.5, .stand_ins = false}, exec,
      with_values(layer, dense(view(values.data(), {sequences, kv_heads, tokens, head_dim}))));
}

/// No memory holds it, though each product modulo 2^32 is small.
void check_saturation() {
  for (const index_t extent :
       {index_t{1} << 30, index_t{1} << 32, (index_t{1} << 32) + 1, index_t{1} << 62}) {
    arena count;
    (void)count.array<float>(extent);
    check(count.bytes() == largest, "an extent wraps");
    (void)count.array<char>(1);
    check(count.bytes() == largest, "a sum wraps");
  }
  arena none;
  (void)none.array<float>(index_t{1} << 62, 0);
  check(none.bytes() == 0, "nothing needs something");

  float element = 0;
  const index_t many = max_count;
  const dense keys(view<float, 4>(&element, {1, 4, many, 128}, {0, 0, 0, 0}));
  const view<float, 4> row(&element, {1, 1, 4, 128}, {0, 0, 0, 0});
  const auto layer = observe(row, keys, {.index = 7});
  check(workspace_size(policy::h2o{}, cpu_backend{}, layer) == largest, "counts wrap");
  check(workspace_size(policy::twilight{}, cpu_backend{}, layer) == largest, "counts wrap");
}

}  // namespace

int main() {
  check_policies(cpu_backend{});
  check_policies(cpu_backend{3});
  check_saturation();
}
