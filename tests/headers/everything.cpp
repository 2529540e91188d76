// SPDX-License-Identifier: Apache-2.0
// Every verb and every policy on the CPU, compiled as programs do that have macros of their own, or
// that turn on warnings for what they include by -I.
#if defined(REFREEKV_HOSTILE_MACROS)
#include "hostile_macros.hpp"
#endif
#include <refreekv/refreekv.hpp>

namespace r = refreekv;

namespace {

template <class Policy, class Layer, class... Values>
void use(const Policy& policy, const Layer& layer, const Values&... values) {
  const r::cpu_backend cpu{2};
  const r::decision_of<Policy, r::host_memory> kept{};
  (void)r::why_invalid(policy, layer, kept, values...);
  (void)r::prune(policy, cpu, layer, kept, {nullptr, r::workspace_size(policy, cpu, layer)},
                 r::compaction::sinks_up, values...);
}

template <class T>
auto in_bits(const r::dense<float>& scales) {
  return r::scaled_keys{r::dense(r::view<const T, 4>()), scales};
}
template <class T>
auto in_blocks() {
  return r::block_keys{r::dense(r::view<const T, 4>())};
}

template <class T>
void use_all(const r::dense<T>& keys, r::view<const T, 4> queries, r::scores_view<> scores) {
  const auto layer = r::observe(queries, keys, {.index = 7});
  use(r::policy::refreekv{}, layer, keys);
  use(r::policy::attention_ranked{}, layer);
  use(r::policy::streaming_llm{}, r::observe(keys));
  const auto valued = r::with_values(layer, keys);
  const r::policy::faithful policy{};
  const r::kept_with_stand_ins<> both{};
  (void)r::why_invalid(policy, valued, both);
  (void)r::prune(policy, r::cpu_backend{2}, valued, both, {}, r::compaction::sinks_up);
  (void)r::compact(r::cpu_backend{}, both, r::compaction::sinks_up, keys, keys);
  use(r::policy::h2o{}, r::with_scores(layer, scores), keys);
  use(r::policy::snapkv{}, layer);
  use(r::policy::pyramidkv{}, layer);
  use(r::policy::cake{}, r::with_layers(layer, {}));
  use(r::policy::cake_decode{}, layer);
  use(r::policy::tova{}, layer);
  use(r::policy::twilight{}, r::with_pages(layer, {}));
  const r::int4_keys<> codes{};
  const auto in_codes = r::observe(queries, codes);
  (void)r::select(r::policy::twilight{.full_layers = 0}, r::cpu_backend{}, in_codes, {}, {});
  (void)r::quantise(r::cpu_backend{}, keys, codes);
  const r::dense<float> scales(r::view<float, 4>{});
  const auto decide = [&](const auto& packed) {
    const r::cpu_backend cpu;
    (void)r::select(r::policy::refreekv{}, cpu, r::observe(queries, packed), {}, {});
  };
  decide(in_bits<std::int8_t>(scales));
  decide(in_bits<r::fp8_e4m3_bits>(scales));
  decide(in_blocks<r::q8_0_block>());
  decide(in_blocks<r::q4_0_block>());
  (void)r::bound_pages(r::cpu_backend{}, keys, r::page_bounds<>{});
}

}  // namespace

int main() {
  use_all<float>(r::dense(r::view<float, 4>()), {}, {});
  use_all<r::f16_bits>(r::dense(r::view<r::f16_bits, 4>()), {}, {});
  use_all<r::bf16_bits>(r::dense(r::view<r::bf16_bits, 4>()), {}, {});
  const r::paged<float> pages(r::view<float, 4>{}, r::page_table<std::int32_t>{});
  use(r::policy::refreekv{}, r::observe(r::view<const float, 4>(), pages, {.index = 7}));
  const r::segmented<float> ring(r::view<float, 4>{}, r::view<const r::segment, 2>{});
  use(r::policy::streaming_llm{}, r::observe(ring));
  const r::page_lists<std::int32_t> table{};
  (void)r::plan_pages(r::cpu_backend{}, {}, 16, r::page_plans<>{});
  (void)r::release_pages(r::cpu_backend{}, {}, table, table);
  (void)r::write_masks(r::cpu_backend{}, r::view<const r::kept_range, 2>{}, r::view<float, 3>{}, 0,
                       1);
}
