// SPDX-License-Identifier: Apache-2.0
// The backend trait: what a backend must be able to do, with the contract of each primitive.
#pragma once

#include <concepts>

#include "refreekv/attention/observe.hpp"
#include "refreekv/attention/page_bounds.hpp"
#include "refreekv/backend/importance.hpp"
#include "refreekv/backend/token_scores.hpp"
#include "refreekv/cache/dense.hpp"
#include "refreekv/cache/int4_keys.hpp"
#include "refreekv/core/status.hpp"
#include "refreekv/decision/page_lists.hpp"
#include "refreekv/decision/stand_ins.hpp"

namespace refreekv::inline v0 {

/// Specialise ops<Backend> to add a backend. Every primitive is a static, noexcept function
/// template that neither allocates nor waits for a device; it takes validated arguments and returns
/// ok or device_error. The members, with B the backend value, `layer` an attention_layer, and
/// shapes and buffers as in norm_scan_buffers:
///
/// - `memory`: where its views live.
///
/// - `scan_scratch carve_scan_scratch(arena&, B, norm_scan, layer)`: what the backend needs besides
///   norm_scan_buffers.
///
/// Of the norm scan, whose steps ranks share their results between. Where seen is sharded, a step
/// reads no chunk of another rank, and leaves 0 in every bit of what it would find there:
///
/// - `read_chunks(B, norm_scan, layer, buffers, scratch)`: reads the keys once and leaves
///   `statistics` of every chunk. O(q_heads * window * tokens * head_dim).
///
/// - `normalise_rows(B, norm_scan, layer, buffers, scratch)`: with `statistics` of all ranks,
/// leaves
///   `rows`. For a mean over several rows it reads the keys again, and `statistics` become what
///   the energies of chunks are found from. O(q_heads * window * chunks), or as read_chunks.
///
/// - `norm_curve(B, norm_scan, layer, buffers, scratch)`: with `statistics` of all ranks, leaves
///   `norms` [sequence, group, chunk]: the entry of a chunk of candidates is the norm, summed over
///   the group's query heads, of a cut at its start; all others are 0. O(q_heads * window *
///   chunks).
///
/// - `crossing_curve(B, norm_scan, layer, buffers, scratch)`: with `norms` summed over ranks, and
///   scratch as norm_curve left it, reads the one chunk again in which each group's loss crosses
///   the threshold and leaves `chunk_norms` [sequence, group, chunk_tokens]: the same norm for a
///   cut at each of its tokens (0 past its end), and `chunk_masses` of the same shape: the largest
///   attention that a row of this rank's heads gives to the candidates before that token. All 0
///   where there is nothing to decide.
///
/// - `find_cuts(B, norm_scan, layer, buffers, kept)`: with `chunk_norms` summed over ranks, writes
///   kept [sequence, group] by `stop`.
///
/// - `compact(B, source, kept, how)`: moves the rows of every (sequence, kv_head) of a kv_source as
///   move_of(kept(s, g), how) says, overlap included; g is the kv_head, or 0 where kept has one
///   group. Bits are copied as they are. With kept_positions it gathers the rows of the positions,
///   in their order, into slots first_slot(counts(s, h), how) and on. O(rows moved * head_dim).
///
/// - `for_each_sequence(B, count, f)`: f(i) for every i in [0, count): sequences, or what a policy
///   has more of than sequences. f is a device-callable object; on a device each i is a thread's.
///
/// Of policies that score tokens. Scores are views [sequence, head, capacity] of which only entries
/// below tokens(s) are read or written; quotas are [sequence].
///
/// - `attention_scratch carve_attention_scratch(arena&, B, rows, layer)`, `selection_scratch
///   carve_selection_scratch(arena&, B, layer)`, where seen may still have its pages,
///   `sharing_scratch carve_sharing_scratch(arena&, B, layer)` and `ranking_scratch
///   carve_ranking_scratch(arena&, B, layer)`: what the backend needs for the primitives below that
///   are given them.
///
/// - `attention_sums(B, score_rows, layer, scores, counts, scratch)`: the attention that each token
///   receives from the last rows, summed, in place of its score or, where it is carried, on top of
///   it. With as many heads as there are KV heads, a score is the mean over the query heads of its
///   group; otherwise heads are query heads. NaN stays NaN unless scores are carried, and what is
///   below 1e-37 of a row counts as 0. counts [sequence, kv_head]: `undecided` becomes whether a
///   row without a softmax was left out of carried scores, or there is no row and nothing is
///   carried. O(q_heads * rows * tokens * head_dim).
///
/// - `attention_spread(B, rows, recent, gain, layer, scores, counts, totals, scratch)`: the same
///   attention of tokens before the last `recent`, but the mean over the rows plus `gain` times
///   their unbiased variance (0 for one row). Into totals [sequence, 2] the sums over tokens and
///   query heads of the entropy -a ln(a + 1e-10), of all rows, and of the variance. Rows without a
///   softmax are left out, and `undecided` says so, or that there is no row. (arXiv 2503.12491,
///   section 4)
///
/// - `pool(B, pooling, quotas, layer, scores, pooled)`: pools along the tokens before the quota's
///   recent ones, which neither get a score nor lend theirs. O(tokens * width).
///
/// - `keep_all(B, layer, kept)`: keeps every token. O(tokens).
///
/// - `share_quotas(B, floor, quotas, layer, scores, shared, scratch)`: shares each sequence's quota
///   out, shared [sequence, kv_head]: a head has of_head(floor, how many of its tokens are among
///   the kv_heads * ranked with the highest scores of all heads, those of lower heads and then the
///   earlier ones among equals). Where the quota holds all, each head has it, and scores are not
///   looked at. With NaN in a score any quotas, but not all of the head that has it, so that
///   top_tokens sees it. O(kv_heads * tokens) expected.
///
/// - `top_tokens(B, quotas, layer, scores, kept, scratch)`: keeps what each KV head's quota says,
///   a quotas_view. A head that is `undecided` already, or has NaN in a score before the recent
///   tokens', keeps all of the sequence, which is undecided then. Scores are not looked at where
///   the quota holds all. O(tokens) expected.
///
/// - `top_mass(B, share, sink_start, layer, scores, kept, scratch)`: scores are of query heads. Of
///   each, keeps the fewest tokens, the earlier ones among equals, whose scores sum to at least
///   `share` of all; a KV head keeps the union over its query heads. Where a query head's scores
///   are all 0 or any is NaN, its KV head is undecided and keeps all. With sink_start the set of
///   Twilight's published kernel. O(tokens) expected, times the steps of a bisection there.
///
/// - `rank_tokens(B, recent, layer, scores, weights, order, norms, scratch)`: order [sequence,
///   kv_head, capacity] sorts the tokens before the last `recent` by score, lowest first, later
///   ones first among equals; norms [sequence, capacity] is the norm scan's curve along it: at i
///   the sum over query heads of the root of the squared weights [sequence, q_head, capacity] of
///   order[i] and all after it, 0 from the last candidate on. O(tokens * log(tokens)).
///
/// - `stop_ranked(B, threshold, recent, layer, norms, order, kept, scratch)`: cuts each head's
/// order
///   at the largest index whose loss, by `norms` summed over ranks, is at most the threshold; what
///   comes after it and the last `recent` tokens stay, all where nothing can be decided.
///   `undecided` says which.
///
/// - `select_pages(B, pages, tokens, layer, scores, scratch)`: seen is a query_layer, scores
///   are of query heads. Those become 0 whose page is not among the best that hold `tokens` tokens,
///   by the sum over dimensions of the largest product of the last query and the page's bounds.
///   Pages that the query does not see take no place. (arXiv 2406.10774)
///
/// Of the faithful rule. seen is a valued_layer, with `rule.rows` rows or more; grades
/// [sequence, kv_head, capacity], lost [sequence, sizes + 1], sizes [sequence]. All share a
/// scratch, and those after weigh_tokens find in it what that has left:
///
/// - `importance_scratch carve_importance_scratch(arena&, B, rule, layer)`.
///
/// - `weigh_tokens(B, rule, layer, scores, counts, scratch)`: scores [sequence, kv_head, capacity]
/// =
///   (peak + last_row * last + prior) * distance * |v| * sigma, where peak is the mean over the
///   query heads of the largest attention of any row, last that of the last one, distance is 1 -
///   the cosine of the key and the mean direction of its head's keys (1 of a key that is 0), and
///   sigma is the root of the mean square over the `typical` tokens of the standard deviation over
///   the rows of their logits without mask and position (1 for one row). `undecided` becomes
///   whether a score, a query or such a logit of the head is not finite, a row has no softmax, or
///   there is no row. O(q_heads * rows * tokens * head_dim).
///
/// - `grade_tokens(B, rule, layer, scores, grades, lost, counts, scratch)`: ranks the candidates of
///   all KV heads together, or of each, by the rule's scope: largest score first, then lower head,
///   then lower position. Size i keeps the first kept_by(i, candidates). lost: the share of all
///   candidates' scores that each size drops; NaN where they are all 0, 0 where there is none. One
///   head that is undecided makes its sequence undecided, of which all stays.
///   O(tokens * log(sizes)) expected.
///
/// - `find_sizes(B, rule, layer, grades, lost, sizes, to, scratch)`: sizes(s) = the smallest that
/// is
///   enough; `to` is where stand-ins will be, which it may work in. The error of a size is the mean
///   over the measured rows of the layer of |o' - o| / (|o| + 1e-9), where o is the row's output,
///   the sum of its attention times values, and o' the same of what the size leaves: the tokens
///   that it keeps and its stand-ins. O(q_heads * rows * tokens * head_dim).
///
/// - `fit_stand_ins(B, rule, layer, grades, sizes, to, scratch)`: writes what stands in for what
///   sizes(s) drops, one row for each block of rule.block positions of which a KV head drops
///   anything, in their order; none where it drops fewer than 2 tokens in all. With
///   cut_scope::layer all heads get the largest number of any: those that have fewer share the
///   dropped tokens of their first blocks, in order and as evenly as can be, among as many rows as
///   it takes. With a, k, v of those that are dropped, a being the mean over all rows of their
///   attention plus 1e-12, normalised, and S a row's logit without mask and position: the value is
///   sum a v, and the key is k0 = sum a k, moved so that S comes near log sum exp S of those
///   dropped, by ridge regression over the rows. O(q_heads * rows * tokens * head_dim).
///
/// - `keep_grades(B, layer, grades, sizes, kept)`: keeps the tokens whose grade is sizes(s) at
/// most.
///   O(tokens).
///
/// - `write_stand_ins(B, source, kept counts, rows, row counts, how)`: rows [sequence, kv_head,
///   stand_in, dim], rounded to the source's type, into slots first_stand_in(...) and on.
///
/// - `quantise(B, keys, from, int4)` and `bound_pages(B, keys, from, pages)`: see
///   key_index.hpp.
///
/// Of what engines want to hear about a decision, see masks.hpp and pages.hpp:
///
/// - `write_masks(B, kept, mask, keep, drop)`: mask [sequence, group, token], rows contiguous:
///   `keep` for tokens that kept(s, g) keeps, `drop` for all others, those past a sequence's tokens
///   among them. With kept_positions the same, of every KV head. Nothing outside the mask is
///   written. O(entries of the mask).
///
/// - `plan_pages(B, kept, page_tokens, shared, to)`: kept [sequence, 1]; to.plans(s) = the
///   page_plan of plan_pages, to.compact_ranges(s, 0) = kept where the plan's sinks move and
///   otherwise a range that drops nothing, to.mask_ranges(s, 0) = kept_slots. shared may have no
///   pointer. O(dropped pages).
///
/// - `release_pages(B, plans, shared, table, freed)`: remove_pages for each sequence: entries
///   [first, last) leave the table, those after them shift down, and ids that nobody shares go to
///   freed.ids in their order; both counts are brought up to date. What is past a count stays as it
///   is. O(pages).
///
/// Results do not depend on how the work is divided: the same inputs give the same bits.
template <class Backend>
struct ops;

/// A value that says where and how work runs: threads, or a device and a stream.
template <class B>
concept backend = requires(const B& exec, const dense<float, typename ops<B>::memory>& rows,
                           view<const kept_range, 2, typename ops<B>::memory> kept) {
  { ops<B>::compact(exec, rows, kept, compaction::sinks_up) } -> std::same_as<status>;
};

}  // namespace refreekv::inline v0
