// SPDX-License-Identifier: Apache-2.0
// What a pruning policy is.
#pragma once

#include "refreekv/backend.hpp"

namespace refreekv::inline v0 {

/// Sums an array over the ranks that share a layer's heads, in place: called at the same points, in
/// the same order, with the same count on every rank. Host backends call it with host memory and
/// expect the sums on return; device backends expect them in stream order.
template <class R>
concept reduction = requires(const R& reduce, double* sums, index_t count) {
  { reduce(sums, count) } -> std::same_as<status>;
};

/// One rank.
struct no_reduction {
  constexpr status operator()(double*, index_t) const noexcept { return status::ok; }
};

/// An aggregate of options whose defaults are the paper's, with
/// - `invalid()`: null, or which option is outside its range; `invalid(seen)` the same, given what
///   there is to see.
/// - `groups(seen)`: cuts of each sequence.
/// - `take(arena, backend, seen)`: carves what `select` works in; its size depends on the extents
///   of `seen` alone, not on lengths.
/// - `select(backend, seen, buffers, kept, reduce)`: writes kept [sequence, group]; arguments are
///   validated.
/// A policy is written on the primitives of ops<Backend> only.
template <class P, class Backend, class Seen>
concept policy_for = backend<Backend> && observation<Seen> &&
                     requires(const P& rule, const Backend& on, const Seen& seen, arena& from,
                              view<kept_range, 2, typename Seen::memory> kept) {
                       { rule.invalid() } -> std::same_as<const char*>;
                       { rule.invalid(seen) } -> std::same_as<const char*>;
                       { rule.groups(seen) } -> std::same_as<index_t>;
                       {
                         rule.select(on, seen, rule.take(from, on, seen), kept, no_reduction{})
                       } -> std::same_as<status>;
                     };

}  // namespace refreekv::inline v0
