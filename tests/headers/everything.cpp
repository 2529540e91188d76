// SPDX-License-Identifier: Apache-2.0
// Every verb and every policy on the CPU, compiled as programs do that have macros of their own, or
// that turn on warnings for what they include by -I.
#if defined(REFREEKV_HOSTILE_MACROS)
#include "hostile_macros.hpp"
#endif
#include <refreekv/cache/scaled_keys.hpp>
#include <refreekv/refreekv.hpp>

namespace r = refreekv;

namespace {

template <class Rule, class Seen, class... Values>
void use(const Rule& rule, const Seen& seen, const Values&... values) {
  const r::cpu_backend cpu{2};
  const r::decision_of<Rule, r::host_memory> kept{};
  (void)r::why_invalid(rule, seen, kept, values...);
  (void)r::prune(rule, cpu, seen, kept, {nullptr, r::workspace_size(rule, cpu, seen)},
                 r::compaction::sinks_up, values...);
}

template <class T>
void use_all(const r::dense<T>& keys, r::view<const T, 4> queries, r::scores_view<> scores) {
  const auto seen = r::observe(queries, keys, {.layer = 7});
  use(r::policy::refreekv{}, seen, keys);
  use(r::policy::attention_ranked{}, seen);
  use(r::policy::streaming_llm{}, r::observe(keys));
  const auto valued = r::with_values(seen, keys);
  const r::policy::faithful rule{};
  const r::kept_with_stand_ins<> both{};
  (void)r::why_invalid(rule, valued, both);
  (void)r::prune(rule, r::cpu_backend{2}, valued, both, {}, r::compaction::sinks_up);
  (void)r::compact(r::cpu_backend{}, both, r::compaction::sinks_up, keys, keys);
  use(r::policy::h2o{}, r::with_scores(seen, scores), keys);
  use(r::policy::snapkv{}, seen);
  use(r::policy::pyramidkv{}, seen);
  use(r::policy::cake{}, r::with_layers(seen, {}));
  use(r::policy::cake_decode{}, seen);
  use(r::policy::tova{}, seen);
  use(r::policy::twilight{}, r::with_pages(seen, {}));
  const r::int4_keys<> codes{};
  const auto in_codes = r::observe(queries, codes);
  (void)r::select(r::policy::twilight{.full_layers = 0}, r::cpu_backend{}, in_codes, {}, {});
  (void)r::quantise(r::cpu_backend{}, keys, codes);
  (void)r::bound_pages(r::cpu_backend{}, keys, r::page_bounds<>{});
}

}  // namespace

int main() {
  use_all<float>(r::dense(r::view<float, 4>()), {}, {});
  use_all<r::f16_bits>(r::dense(r::view<r::f16_bits, 4>()), {}, {});
  use_all<r::bf16_bits>(r::dense(r::view<r::bf16_bits, 4>()), {}, {});
  const r::paged<float> pages(r::view<float, 4>{}, r::page_table<std::int32_t>{});
  use(r::policy::refreekv{}, r::observe(r::view<const float, 4>(), pages, {.layer = 7}));
  const r::segmented<float> ring(r::view<float, 4>{}, r::view<const r::segment, 2>{});
  use(r::policy::streaming_llm{}, r::observe(ring));
  const r::page_lists<std::int32_t> table{};
  (void)r::plan_pages(r::cpu_backend{}, {}, 16, r::page_plans<>{});
  (void)r::release_pages(r::cpu_backend{}, {}, table, table);
  (void)r::write_masks(r::cpu_backend{}, r::view<const r::kept_range, 2>{}, r::view<float, 3>{}, 0,
                       1);
}
