// SPDX-License-Identifier: Apache-2.0
// The concept of a pruning policy, and helpers that policies share.
#pragma once

#include "refreekv/backend/backend.hpp"
#include "refreekv/backend/collective.hpp"
#include "refreekv/policy/options.hpp"

namespace refreekv::inline v0 {

/// The result type of a policy: kept_ranges, kept_positions or kept_with_stand_ins.
template <class Policy, class Memory>
using decision_of = typename std::remove_cvref_t<Policy>::template decision<Memory>;

namespace detail {

/// The object whose carve and select implement a policy: its method, or the policy itself.
template <class Policy, class Layer>
[[nodiscard]] constexpr decltype(auto) method_of(const Policy& policy,
                                                 const Layer& layer) noexcept {
  if constexpr (requires { policy.method(layer); }) {
    return policy.method(layer);
  } else {
    return (policy);
  }
}

/// Whether a policy can decide from this rank's keys: the layer is not sharded, or the policy needs
/// no key of another rank.
template <class Policy, class Layer>
concept sees_enough = !sharded_layer<Layer> || requires { requires Policy::takes_shards; };

}  // namespace detail

/// The number of decisions of a policy about each sequence: 1, or one for each KV head. O(1).
template <class Policy, class Layer>
[[nodiscard]] constexpr index_t groups_of(const Policy& policy, const Layer& layer) noexcept {
  if constexpr (requires { policy.groups(layer); }) {
    return policy.groups(layer);
  } else {
    return layer.kv_heads();
  }
}

/// A policy: an aggregate of options whose defaults are the paper's. It is written on the
/// primitives of ops<Backend> alone. Its members:
/// - `name`: a constant, as command lines and bindings spell it.
/// - `decision<Memory>`: the type of its result, kept_ranges, kept_positions or
///   kept_with_stand_ins.
/// - `options`: a constant, the tuple of its `option`s. A policy outside the library may instead
///   have `invalid()`, which returns null, or what is wrong with its options, in words.
/// - `invalid(layer)`, optional: null, or why the policy cannot decide about this layer.
///   `invalid(layer, kept)`, optional: the same for the memory of the result.
/// - `groups(layer)`, for kept_ranges only: the number of decisions about each sequence, 1 or
///   kv_heads.
/// - `carve(arena, backend, layer)`: returns the buffers of `select`. Their size depends on the
///   extents of `layer` alone, not on its lengths.
/// - `select(backend, layer, buffers, kept, ranks)`: writes the decision to `kept`. Its arguments
///   have been validated.
/// - `method(layer)`, in place of `carve` and `select`: returns an object that has both. Several
///   policies may share its type.
/// - `takes_shards`, optional: a constant, true where the policy needs no key of another rank.
template <class P, class Backend, class Layer>
concept policy_for =
    backend<Backend> && model_layer<Layer> && detail::sees_enough<P, Layer> &&
    requires(const P& policy, const Backend& exec, const Layer& layer, arena& from,
             const decision_of<P, typename Layer::memory>& kept) {
      { why_invalid(policy) } -> std::same_as<const char*>;
      {
        detail::method_of(policy, layer)
            .select(exec, layer, detail::method_of(policy, layer).carve(from, exec, layer), kept,
                    single_rank{})
      } -> std::same_as<status>;
    };

namespace detail {

/// Whether a layer is one of the first `full_layers`, which a policy never prunes. False if the
/// layer's number is not set.
template <model_layer Layer>
[[nodiscard]] constexpr bool stays_whole(const Layer& layer, count_t full_layers) noexcept {
  return layer.info.index != unknown_layer && layer.info.index < full_layers;
}

/// Null, or the error that a policy with full_layers > 0 has a layer whose number is not set.
template <model_layer Layer>
[[nodiscard]] constexpr const char* needs_layer(const Layer& layer, count_t full_layers) noexcept {
  return full_layers > 0 && layer.info.index == unknown_layer
             ? "layer_info::index is not set: the policy's full_layers need it, or be 0"
             : nullptr;
}

/// The largest number of rows that any sequence has in a window of `window` rows.
template <attention_layer Layer>
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t most_rows(const Layer& layer,
                                                               count_t window) noexcept {
  return layer.window() < window ? layer.window() : index_t{window};
}

/// Writes range(tokens) to every group of a sequence.
template <class Layer, class Range>
struct assign_range {
  Layer layer;
  kept_ranges<typename Layer::memory> kept;
  Range range;

  REFREEKV_HOST_DEVICE constexpr void operator()(index_t s) const noexcept {
    for (index_t g = 0; g < kept.extent(1); ++g) kept(s, g) = range(layer.tokens(s));
  }
};

/// Writes kept(s, g) = range(tokens(s)) for every sequence and group.
template <class Backend, class Layer, class Range>
status assign(const Backend& exec, const Layer& layer,
              const kept_ranges<typename Layer::memory>& kept, const Range& range) noexcept {
  return ops<Backend>::for_each_sequence(exec, layer.sequences(),
                                         assign_range<Layer, Range>{layer, kept, range});
}

}  // namespace detail

}  // namespace refreekv::inline v0
