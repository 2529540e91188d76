// SPDX-License-Identifier: Apache-2.0
// The backend trait: what a backend must be able to do, with the contract of each primitive.
#pragma once

#include <concepts>

#include "refreekv/norm_scan.hpp"
#include "refreekv/observation.hpp"
#include "refreekv/status.hpp"

namespace refreekv::inline v0 {

/// Specialise ops<Backend> to add a backend. Every primitive is a static, noexcept function
/// template that neither allocates nor waits for a device; it takes validated arguments and returns
/// ok or device_error. The members, with B the backend value, `seen` an attention_observation, and
/// shapes and buffers as in norm_scan_buffers:
///
/// - `memory`: where its views live.
///
/// - `scan_scratch take_scan_scratch(arena&, B, norm_scan, seen)`: what the backend needs besides
///   norm_scan_buffers.
///
/// - `norm_curve(B, norm_scan, seen, buffers, scratch)`: reads the keys once (twice for a mean over
///   several rows) and leaves `norms` [sequence, group, chunk]: the entry of a chunk of candidates
///   is the norm, summed over the group's query heads, of a cut at its start; all others are 0.
///   `statistics` and `rows` stay for the next step. O(q_heads * window * tokens * head_dim).
///
/// - `crossing_curve(B, norm_scan, seen, buffers, scratch)`: with `norms` summed over ranks, reads
///   the one chunk again in which each group's loss crosses the threshold and leaves `chunk_norms`
///   [sequence, group, chunk_tokens]: the same norm for a cut at each of its tokens (0 past its
///   end), and `chunk_masses` of the same shape: the largest attention that a row of this rank's
///   heads gives to the candidates before that token. All 0 where there is nothing to decide.
///
/// - `find_cuts(B, norm_scan, seen, buffers, kept)`: with `chunk_norms` summed over ranks, writes
///   kept [sequence, group] by `stop`.
///
/// - `assign(B, seen, kept, f)`: kept(s, g) = f(tokens(s)); f is a device-callable object.
///
/// - `compact(B, source, kept, how)`: moves the rows of every (sequence, kv_head) of a kv_source as
///   move_of(kept(s, g), how) says, overlap included; g is the kv_head, or 0 where kept has one
///   group. Bits are copied as they are. O(rows moved * head_dim).
///
/// Results do not depend on how the work is divided: the same inputs give the same bits.
template <class Backend>
struct ops;

/// A value that says where and how work runs: threads, or a device and a stream.
template <class B>
concept backend = requires(const B& on, const dense<float, typename ops<B>::memory>& rows,
                           view<const kept_range, 2, typename ops<B>::memory> kept) {
  { ops<B>::compact(on, rows, kept, compaction::sinks_up) } -> std::same_as<status>;
};

}  // namespace refreekv::inline v0
