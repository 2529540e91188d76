// SPDX-License-Identifier: Apache-2.0
// Every policy and verb on the CUDA backend, for every element type and layout: this compiles
// where there is no device to run it.
#include "refreekv/cuda.cuh"

using namespace refreekv;

namespace {

using device = device_memory;

template <class Rule, class Seen>
void select_and_size(const Rule& rule, const Seen& seen) {
  (void)workspace_size(rule, cuda_backend{}, seen);
  (void)select(rule, cuda_backend{}, seen, decision_of<Rule, device>{}, workspace<device>{});
}

template <class Seen>
void use_every_policy(const Seen& seen) {
  select_and_size(policy::refreekv{}, seen);
  select_and_size(policy::streaming_llm{}, seen);
  select_and_size(policy::h2o{}, seen);
  select_and_size(policy::h2o{}, with_scores(seen, scores_view<device>{}));
  select_and_size(policy::snapkv{}, seen);
  select_and_size(policy::pyramidkv{}, seen);
  select_and_size(policy::cake{}, with_layers(seen, cake_layers<device>{}));
  select_and_size(policy::cake_decode{}, seen);
  select_and_size(policy::tova{}, seen);
  select_and_size(policy::attention_ranked{}, seen);
  select_and_size(policy::twilight{}, seen);
  if constexpr (requires { seen.queries; }) {
    select_and_size(policy::twilight{}, with_pages(seen, page_bounds<device>{}));
  }
}

/// For policies that go by values, which come with their keys.
template <class Query, class Source>
void use_values(const Source& source) {
  const auto seen = with_values(observe(view<const Query, 4, device>{}, source), source);
  const policy::faithful rule;
  const kept_with_stand_ins<device> kept{{}, {}};
  (void)workspace_size(rule, cuda_backend{}, seen);
  (void)select(rule, cuda_backend{}, seen, kept, workspace<device>{});
  (void)compact(cuda_backend{}, kept, compaction::suffix_down, source, source);
}

template <class Source>
void use_every_verb(const Source& source) {
  const cuda_backend on;
  (void)compact(on, view<const kept_range, 2, device>{}, compaction::sinks_up, source);
  (void)compact(on, kept_positions<device>{}, compaction::suffix_down, source);
  (void)quantise(on, source, int4_keys<device>{});
  (void)bound_pages(on, source, page_bounds<device>{});
}

template <class Query, class Keys>
auto observed_by(const Keys& keys) {
  return observe(view<const Query, 4, device>{}, keys);
}

template <class T>
using tensor = dense<T, device>;
template <class T>
using scaled = scaled_keys<tensor<const T>, tensor<const float>>;

}  // namespace

void use_everything(const tensor<__nv_bfloat16>& bf16, const tensor<__half>& half,
                    const tensor<float>& single, const paged<__nv_bfloat16, int, device>& pages,
                    const paged<__half, std::int64_t, device>& wide_pages,
                    const segmented<__half, device>& segments,
                    const layered<paged<__nv_bfloat16, int, device>>& paged_layers,
                    const scaled<__nv_fp8_e4m3>& fp8, const scaled<std::int8_t>& int8,
                    const int4_keys<device>& int4, view<const __half, 4, device> rows) {
  use_every_policy(observed_by<__nv_bfloat16>(bf16));
  use_every_policy(observe_rows(rows, 8));
  use_every_verb(bf16);
  use_every_verb(pages);
  use_every_verb(tensor<__half>(half));
  use_every_verb(single);
  select_and_size(policy::refreekv{}, observed_by<__half>(half));
  select_and_size(policy::refreekv{}, observed_by<float>(single));
  select_and_size(policy::refreekv{}, observed_by<__nv_bfloat16>(pages));
  select_and_size(policy::refreekv{}, observed_by<__half>(wide_pages));
  select_and_size(policy::refreekv{}, observed_by<__half>(segments));
  select_and_size(policy::refreekv{}, observed_by<__nv_bfloat16>(paged_layers));
  select_and_size(policy::refreekv{}, observed_by<__nv_bfloat16>(fp8));
  select_and_size(policy::refreekv{}, observed_by<__half>(int8));
  select_and_size(policy::snapkv{}, observed_by<__nv_bfloat16>(fp8));
  select_and_size(policy::twilight{}, observed_by<__half>(int4));

  use_values<__nv_bfloat16>(pages);
  use_values<__half>(segments);
  use_values<float>(single);

  const shard own(pages, view<const token_range, 2, device>{}, lengths_view<device>{}, 0);
  const auto exchange = [](std::uint32_t*, index_t) { return status::ok; };
  (void)select(policy::refreekv{}, cuda_backend{}, observed_by<__nv_bfloat16>(own),
               kept_ranges<device>{}, workspace<device>{}, exchange);
  (void)own_ranges(cuda_backend{}, own, view<const kept_range, 2, device>{}, kept_ranges<device>{});

  // Engines' pools, whose sources are of the types above.
  const page_table<int, device> table;
  (void)compact(cuda_backend{}, view<const kept_range, 2, device>{}, compaction::sinks_up,
                layouts::vllm_packed(static_cast<__nv_bfloat16*>(nullptr), {}, table).keys,
                layouts::tensorrt_llm(static_cast<__nv_bfloat16*>(nullptr), {}, table).values);

  const cuda_backend on;
  (void)write_masks(on, view<const kept_range, 2, device>{}, view<bool, 3, device>{}, true, false);
  (void)write_masks(on, kept_positions<device>{}, view<__half, 3, device>{}, __half{}, __half{});
  (void)plan_pages(on, view<const kept_range, 2, device>{}, 16, page_plans<device>{});
  (void)release_pages(on, view<const page_plan, 1, device>{}, page_lists<std::int32_t, device>{},
                      page_lists<std::int32_t, device>{});
}
