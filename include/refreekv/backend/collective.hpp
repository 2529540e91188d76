// SPDX-License-Identifier: Apache-2.0
// The communication of ranks that share a layer: sums over heads (tensor parallel) and gathers over
// tokens (context parallel).
#pragma once

#include <concepts>

#include "refreekv/attention/layer.hpp"
#include "refreekv/core/status.hpp"

namespace refreekv::inline v0 {

/// Sums `count` doubles, in place, over the ranks that share a layer's heads (tensor parallel).
/// Every rank calls it at the same points, in the same order, with the same count. Host backends
/// pass host memory and require the sums on return; device backends require them in stream order.
template <class R>
concept head_reduction = requires(const R& reduce, double* sums, index_t count) {
  { reduce(sums, count) } -> std::same_as<status>;
};

/// Sums `count` 32-bit words, in place and wrapping around, over the ranks that share a sequence's
/// tokens (context parallel; see cache/shard.hpp). At most one rank holds a non-zero value of each
/// word, so the sum is a gather: every rank receives the results of all. Called under the
/// conditions of a head_reduction. The words are the bits of floats and doubles: copy them as MPI,
/// NCCL or memcpy do.
template <class E>
concept token_exchange = requires(const E& e, std::uint32_t* words, index_t count) {
  { e(words, count) } -> std::same_as<status>;
};

/// The collective operations of a rank with the other ranks of a layer: a head_reduction over ranks
/// with other heads, a token_exchange over ranks with other tokens.
/// - Heads and tokens split: one object with both calls. The reductions must return the same bits
///   on all ranks with the same heads; they do if each adds the ranks up in the same order.
/// - Tokens only: the object must not accept doubles (as a lambda of `auto*` would).
/// A rank whose arguments are refused calls neither, so ranks must agree on why_invalid and on
/// their workspaces before.
template <class J, class Layer>
concept collective =
    (sharded_layer<Layer> && token_exchange<J>) || (!sharded_layer<Layer> && head_reduction<J>);

/// A single rank: nothing is exchanged.
struct single_rank {
  constexpr status operator()(double*, index_t) const noexcept { return status::ok; }
};

}  // namespace refreekv::inline v0
