// SPDX-License-Identifier: Apache-2.0
// Every policy and verb on the CUDA backend, for every element type and layout: this compiles
// where there is no device to run it.
#include <tuple>

#include "refreekv/cuda.cuh"

using namespace refreekv;

namespace {

using device = device_memory;

template <class Policy, class Layer>
void select_and_size(const Policy& policy, const Layer& layer) {
  (void)workspace_size(policy, cuda_backend{}, layer);
  (void)select(policy, cuda_backend{}, layer, decision_of<Policy, device>{}, workspace<device>{});
}

/// Every policy that can decide about the layer, and those that need state beside it.
template <class Layer>
void use_every_policy(const Layer& layer) {
  const auto use = [&]<class Policy>(const Policy& policy) {
    if constexpr (policy_for<Policy, cuda_backend, Layer>) select_and_size(policy, layer);
  };
  std::apply([&](const auto&... each) { (use(each), ...); }, all_policies{});
  select_and_size(policy::h2o{}, with_scores(layer, scores_view<device>{}));
  select_and_size(policy::cake{}, with_layers(layer, cake_layers<device>{}));
  select_and_size(policy::cake_decode{}, layer);
  if constexpr (requires { layer.queries; }) {
    select_and_size(policy::twilight{}, with_pages(layer, page_bounds<device>{}));
  }
}

/// For policies that go by values, which come with their keys.
template <class Query, class Source>
void use_values(const Source& source) {
  const auto layer = with_values(observe(view<const Query, 4, device>{}, source), source);
  const policy::faithful policy;
  const kept_with_stand_ins<device> kept{{}, {}};
  (void)workspace_size(policy, cuda_backend{}, layer);
  (void)select(policy, cuda_backend{}, layer, kept, workspace<device>{});
  (void)compact(cuda_backend{}, kept, compaction::suffix_down, source, source);
}

template <class Source>
void use_every_verb(const Source& source) {
  const cuda_backend exec;
  (void)compact(exec, view<const kept_range, 2, device>{}, compaction::sinks_up, source);
  (void)compact(exec, kept_positions<device>{}, compaction::suffix_down, source);
  (void)quantise(exec, source, int4_keys<device>{});
  (void)bound_pages(exec, source, page_bounds<device>{});
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
                    const tensor<q8_0_block>& q8, const tensor<q4_0_block>& q4,
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
  select_and_size(policy::refreekv{}, observed_by<__half>(block_keys{q8}));
  select_and_size(policy::snapkv{}, observed_by<__half>(block_keys{q4}));
  (void)compact(cuda_backend{}, kept_ranges<device>{}, compaction::sinks_up, q8);
  select_and_size(policy::twilight{}, observed_by<__half>(int4));

  use_values<__nv_bfloat16>(pages);
  use_values<__half>(segments);
  use_values<float>(single);

  const shard own(pages, view<const token_range, 2, device>{}, lengths_view<device>{}, 0);
  const auto exchange = [](std::uint32_t*, index_t) { return status::ok; };
  (void)select(policy::refreekv{}, cuda_backend{}, observed_by<__nv_bfloat16>(own),
               kept_ranges<device>{}, workspace<device>{}, exchange);
  (void)local_ranges(cuda_backend{}, own, view<const kept_range, 2, device>{},
                     kept_ranges<device>{});

  // Engines' pools, whose sources are of the types above.
  const page_table<int, device> table;
  (void)compact(cuda_backend{}, view<const kept_range, 2, device>{}, compaction::sinks_up,
                layouts::vllm_packed(static_cast<__nv_bfloat16*>(nullptr), {}, table).keys,
                layouts::tensorrt_llm(static_cast<__nv_bfloat16*>(nullptr), {}, table).values);

  const cuda_backend exec;
  (void)write_masks(exec, view<const kept_range, 2, device>{}, view<bool, 3, device>{}, true,
                    false);
  (void)write_masks(exec, kept_positions<device>{}, view<__half, 3, device>{}, __half{}, __half{});
  (void)plan_pages(exec, view<const kept_range, 2, device>{}, 16, page_plans<device>{});
  (void)release_pages(exec, view<const page_plan, 1, device>{}, page_lists<std::int32_t, device>{},
                      page_lists<std::int32_t, device>{});
}
