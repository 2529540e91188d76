// SPDX-License-Identifier: Apache-2.0
// What a pruning policy is.
#pragma once

#include "refreekv/backend/backend.hpp"
#include "refreekv/backend/collective.hpp"

namespace refreekv::inline v0 {

/// What a policy writes: kept_ranges or kept_positions.
template <class Policy, class Memory>
using decision_of = typename std::remove_cvref_t<Policy>::template decision<Memory>;

namespace detail {

/// What carries a policy out: its method, or the policy itself.
template <class Policy, class Seen>
[[nodiscard]] constexpr decltype(auto) method_of(const Policy& rule, const Seen& seen) noexcept {
  if constexpr (requires { rule.method(seen); }) {
    return rule.method(seen);
  } else {
    return (rule);
  }
}

/// Whether a policy needs no key of another rank.
template <class Policy, class Seen>
concept sees_enough = !sharded<Seen> || requires { requires Policy::takes_shards; };

}  // namespace detail

/// How many decisions a policy makes about each sequence: 1, or one for each KV head.
template <class Policy, class Seen>
[[nodiscard]] constexpr index_t groups_of(const Policy& rule, const Seen& seen) noexcept {
  if constexpr (requires { rule.groups(seen); }) {
    return rule.groups(seen);
  } else {
    return seen.kv_heads();
  }
}

/// An aggregate of options whose defaults are the paper's, with
/// - `decision<Memory>`: what it writes, kept_ranges or kept_positions.
/// - `invalid()`: null, or which option is outside its range; `invalid(seen)` the same, given what
///   there is to see.
/// - `groups(seen)`: for kept_ranges, decisions about each sequence: 1 or kv_heads.
/// - `take(arena, backend, seen)`: carves what `select` works in; its size depends on the extents
///   of `seen` alone, not on lengths.
/// - `select(backend, seen, buffers, kept, reduce)`: decides; arguments are validated.
/// - or, for both, `method(seen)`: an object that has them, for what several policies share.
/// - `takes_shards`: a constant, true where it decides without the keys of other ranks.
/// A policy is written on the primitives of ops<Backend> only.
template <class P, class Backend, class Seen>
concept policy_for = backend<Backend> && observation<Seen> && detail::sees_enough<P, Seen> &&
                     requires(const P& rule, const Backend& on, const Seen& seen, arena& from,
                              const decision_of<P, typename Seen::memory>& kept) {
                       { rule.invalid() } -> std::same_as<const char*>;
                       { rule.invalid(seen) } -> std::same_as<const char*>;
                       {
                         detail::method_of(rule, seen)
                             .select(on, seen, detail::method_of(rule, seen).take(from, on, seen),
                                     kept, no_reduction{})
                       } -> std::same_as<status>;
                     };

namespace detail {

/// Whether a layer is one of the first, which a rule never prunes.
template <observation Seen>
[[nodiscard]] constexpr bool stays_whole(const Seen& seen, count_t full_layers) noexcept {
  return seen.info.layer != unknown_layer && seen.info.layer < full_layers;
}

/// Null, or that a rule that leaves the first layers whole does not know which layer it sees.
template <observation Seen>
[[nodiscard]] constexpr const char* needs_layer(const Seen& seen, count_t full_layers) noexcept {
  return full_layers > 0 && seen.info.layer == unknown_layer
             ? "layer_info::layer is not set: the rule's full_layers need it, or be 0"
             : nullptr;
}

/// The most rows that a window of `window` takes of any sequence.
template <attention_observation Seen>
[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t most_rows(const Seen& seen,
                                                               count_t window) noexcept {
  return seen.window() < window ? seen.window() : index_t{window};
}

/// Writes range(tokens) for every group of a sequence.
template <class Seen, class Range>
struct assign_range {
  Seen seen;
  kept_ranges<typename Seen::memory> kept;
  Range range;

  REFREEKV_HOST_DEVICE constexpr void operator()(index_t s) const noexcept {
    for (index_t g = 0; g < kept.extent(1); ++g) kept(s, g) = range(seen.tokens(s));
  }
};

/// kept(s, g) = range(tokens(s)).
template <class Backend, class Seen, class Range>
status assign(const Backend& on, const Seen& seen, const kept_ranges<typename Seen::memory>& kept,
              const Range& range) noexcept {
  return ops<Backend>::for_each_sequence(on, seen.sequences(),
                                         assign_range<Seen, Range>{seen, kept, range});
}

}  // namespace detail

}  // namespace refreekv::inline v0
