// SPDX-License-Identifier: Apache-2.0
// What joins the ranks that share a layer: sums over heads, and gathers over tokens.
#pragma once

#include <concepts>

#include "refreekv/attention/layer.hpp"
#include "refreekv/core/status.hpp"

namespace refreekv::inline v0 {

/// Sums an array over the ranks that share a layer's heads, in place: called at the same points, in
/// the same order, with the same count on every rank. Host backends call it with host memory and
/// expect the sums on return; device backends expect them in stream order.
template <class R>
concept head_reduction = requires(const R& reduce, double* sums, index_t count) {
  { reduce(sums, count) } -> std::same_as<status>;
};

/// Gives what one rank has found to all that share a sequence's tokens (see cache/shard.hpp): sums
/// 32-bit words over them, in place, wrapping around; of each word all ranks but one have 0. Called
/// as a reduction is. The words are the bits of floats and doubles: copy them as MPI, NCCL or
/// memcpy do.
template <class E>
concept token_exchange = requires(const E& e, std::uint32_t* words, index_t count) {
  { e(words, count) } -> std::same_as<status>;
};

/// What joins a rank to those with other heads (a reduction) or other tokens (an exchange) of a
/// layer: an object with both calls where both are split, and where only tokens are it must not
/// take doubles (as a lambda of `auto*` would). Then the reductions have to give the same bits on
/// all ranks with the same heads, as they do if each adds ranks up in the same order. A rank that
/// is refused calls neither: ranks agree on why_invalid and their workspaces before.
template <class J, class Layer>
concept collective =
    (sharded_layer<Layer> && token_exchange<J>) || (!sharded_layer<Layer> && head_reduction<J>);

/// One rank.
struct single_rank {
  constexpr status operator()(double*, index_t) const noexcept { return status::ok; }
};

}  // namespace refreekv::inline v0
