// SPDX-License-Identifier: Apache-2.0
// torch.ops.refreekv.select_NAME of each policy NAME of all_policies, on CPU tensors.
//
// queries: the last rows, [batch, q_head, row, head_dim], rotated as the keys are. A policy reads
// as many of them as its window has, from the last back. keys: [batch, kv_head, token, head_dim].
// layer: the layer's number; -1 where the policy does not depend on it. scale: the factor of q.k; 0
// means 1 / sqrt(head_dim). All other arguments are the policy's options, with its defaults.
//
// A policy that keeps ranges returns int32 [batch, 1 or kv_head, 3]: sinks, cut, tokens; [0, sinks)
// and [cut, tokens) stay. The others return positions, int32 [batch, kv_head, token], and counts,
// int32 [batch, kv_head]: the first counts[s, h] positions stay, and -1 follows them.
// - faithful also takes values, of the keys' type. It also returns stand-ins: float32 keys and
//   values [batch, kv_head, stand_in, head_dim], and their counts.
// - cake also takes the state of its cascade, and writes to it: scores, float32
//   [batch, kv_head, token] of this layer, and preferences, float64 [batch, layer]. To let an
//   earlier layer drop more, call it again for that layer without queries, with `finished`, the
//   number of layers so far. Before that, compact the scores with the keys, as [..., None], and
//   pass prompts, int32 [batch], the tokens before any was dropped.
//
// Not served: batches of different lengths, soft caps, sliding windows, ALiBi and learned sinks;
// h2o's scores from step to step, cake_decode, and the page selector of twilight.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <refreekv/attention/observe.hpp>
#include <refreekv/attention/valued_layer.hpp>
#include <refreekv/cpu/backend.hpp>
#include <refreekv/policy/all.hpp>
#include <refreekv/select.hpp>

#include "policy_arguments.hpp"
#include "results.hpp"
#include "tensors.hpp"

namespace refreekv_torch {

namespace {

using backend = kv::cpu_backend<torch_threads>;
using plain_layer = kv::query_layer<float, kv::dense<float>>;
using valued_layer = kv::valued_layer<plain_layer, kv::dense<float>>;
using cascaded_layer = kv::cascaded_layer<plain_layer>;

/// What a policy needs besides queries and keys.
template <class Policy>
concept needs_nothing = kv::policy_for<Policy, backend, plain_layer>;
template <class Policy>
concept needs_values = !needs_nothing<Policy> && kv::policy_for<Policy, backend, valued_layer>;
template <class Policy>
concept needs_state = !needs_nothing<Policy> && kv::policy_for<Policy, backend, cascaded_layer>;

constexpr const char* rows_of_heads = "[batch, kv_head, token, head_dim]";

/// The state that CAKE keeps across layers, in the caller's tensors.
kv::cake_layers<> state_of(const arguments& given) {
  const at::Tensor& scores = given["scores"].toTensor();
  const at::Tensor& preferences = given["preferences"].toTensor();
  require_shape(scores, "scores", 3, "[batch, kv_head, token]", at::kFloat);
  require_shape(preferences, "preferences", 2, "[batch, layer]", at::kDouble);
  at::assert_no_internal_overlap(scores);
  at::assert_no_internal_overlap(preferences);
  const c10::IValue& finished = given["finished"];
  kv::cake_layers<> layers{
      .scores = view_of<float, 3>(scores),
      .preferences = view_of<double, 2>(preferences),
      .finished = count_of(finished.isNone() ? given["layer"].toInt() + 1 : finished.toInt())};
  if (!given["prompts"].isNone()) {
    const at::Tensor& prompts = given["prompts"].toTensor();
    require_shape(prompts, "prompts", 1, "[batch]", at::kInt);
    layers.prompts = view_of<const kv::position_t, 1>(prompts);
  }
  return layers;
}

/// The rows in float32: exact from 16 bits, and they are few. Undefined if there are none.
at::Tensor rows_of(const arguments& given) {
  if (given["queries"].isNone()) return {};
  const at::Tensor& queries = given["queries"].toTensor();
  require_shape(queries, "queries", 4, "[batch, q_head, row, head_dim]");
  TORCH_CHECK(at::isFloatingType(queries.scalar_type()), "refreekv: queries must be floats, not ",
              queries.scalar_type());
  return queries.to(at::kFloat);
}

/// Calls f(layer) with the layer that the policy decides about.
template <class Policy, class F>
void with_layer(const arguments& given, const at::Tensor& rows, const F& f) {
  const at::Tensor& keys = given["keys"].toTensor();
  require_shape(keys, "keys", 4, rows_of_heads);
  const kv::layer_info<> info{
      .index = given["layer"].toInt(),
      .attention = {.scale = static_cast<float>(given["scale"].toDouble())}};
  const auto observe =
      [&](const auto& cache) {  // the library has [sequence, row, q_head, head_dim]
        return kv::observe(view_of<const float, 4>(rows.transpose(1, 2)), cache, info);
      };
  if constexpr (needs_values<Policy>) {
    const at::Tensor& values = given["values"].toTensor();
    require_shape(values, "values", 4, rows_of_heads);
    with_caches([&](const auto& cache,
                    const auto& value_cache) { f(kv::with_values(observe(cache), value_cache)); },
                keys, values);
  } else if constexpr (needs_state<Policy>) {
    const kv::cake_layers<> state = state_of(given);
    with_caches(
        [&](const auto& cache) {
          if (rows.defined()) {
            f(kv::with_layers(observe(cache), state));
          } else {
            f(kv::with_layers(kv::observe(cache, info), state));
          }
        },
        keys);
  } else {
    static_assert(needs_nothing<Policy>, "the policy needs something that torch does not pass");
    with_caches([&](const auto& cache) { f(observe(cache)); }, keys);
  }
}

template <class Policy, class Layer>
void run_select(const Policy& policy, const Layer& layer,
                const kv::decision_of<Policy, kv::host_memory>& kept) {
  require_valid(kv::why_invalid(policy, layer, kept));
  const backend exec{torch_threads{}};
  const at::Tensor scratch =
      at::empty({static_cast<int64_t>(kv::workspace_size(policy, exec, layer))}, at::kByte);
  require_ok(kv::select(policy, exec, layer, kept,
                        {static_cast<std::byte*>(scratch.data_ptr()),
                         static_cast<std::size_t>(scratch.numel())}),
             "select");
}

/// The operator of a policy. For Meta tensors (`decides` is false) only the shapes are made.
template <class Policy, bool decides>
void select(const c10::OperatorHandle& op, std::vector<c10::IValue>* stack) {
  using decision = result<kv::decision_of<Policy, kv::host_memory>>;
  const arguments given(op.schema(), *stack);
  Policy policy = policy_of<Policy>(given);
  const at::Tensor rows = rows_of(given);
  if constexpr (requires { policy.window; }) {
    if (given.find("window") == nullptr) policy.window = count_of(rows.size(2));
  }
  require_valid(kv::why_invalid(policy));
  std::optional<decision> made;
  with_layer<Policy>(given, rows, [&](const auto& layer) {
    made.emplace(policy, layer, given["keys"].toTensor().options());
    if constexpr (decides) {
      run_select(policy, layer, made->kept());
      made->finish();
    }
  });
  stack->resize(stack->size() - op.schema().arguments().size());
  made->push(*stack);
}

/// Returns the schema of a policy's operator. Without the option `window`, all rows are the window.
template <class Policy>
std::string schema_of(const std::string& name, bool has_window = true) {
  std::string text = name;
  if constexpr (needs_state<Policy>) {
    text +=
        "(Tensor? queries, Tensor keys, Tensor(a!) scores, Tensor(b!) preferences, *, int layer"
        ", int? finished=None, Tensor? prompts=None";
  } else {
    text += "(Tensor queries, Tensor keys";
    text += needs_values<Policy> ? ", Tensor values, *, int layer" : ", *, int layer";
  }
  const Policy defaults;
  for_each_argument(defaults, [&](const std::string& option, const auto& value) {
    if (has_window || option != "window") text += ", " + declaration(option, value);
  });
  return text + ", float scale=0.0) -> " + result<kv::decision_of<Policy, kv::host_memory>>::schema;
}

/// Calls f.operator()<Policy>(name of its operator) for every policy.
template <class F>
void for_each_policy(const F& f) {
  std::apply(
      [&]<class... Policy>(const Policy&...) {
        (f.template operator()<Policy>(std::string("select_") + Policy::name), ...);
      },
      kv::all_policies{});
}

template <bool decides>
void implement_all(torch::Library& m) {
  const auto implement = [&]<class Policy>(const std::string& name) {
    m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&select<Policy, decides>>());
  };
  for_each_policy(implement);
  implement.template operator()<kv::policy::refreekv>("select");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(refreekv, m) {
  for_each_policy(
      [&]<class Policy>(const std::string& name) { m.def(schema_of<Policy>(name).c_str()); });
  // select_refreekv whose window is all of the rows.
  m.def(schema_of<kv::policy::refreekv>("select", false).c_str());
}

TORCH_LIBRARY_IMPL(refreekv, CPU, m) { implement_all<true>(m); }
TORCH_LIBRARY_IMPL(refreekv, Meta, m) { implement_all<false>(m); }

}  // namespace refreekv_torch
