// SPDX-License-Identifier: Apache-2.0
// The backend trait: the primitives that a backend must have, with the contract of each.
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
/// template that neither allocates nor waits for a device. It receives validated arguments and
/// returns ok or device_error. Below, B is the backend value, `layer` is an attention_layer, and
/// shapes and buffers are those of norm_scan_buffers:
///
/// - `memory`: the memory of its views.
///
/// - `scan_scratch carve_scan_scratch(arena&, B, norm_scan, layer)`: the backend's own scratch,
///   besides norm_scan_buffers.
///
/// Primitives of the norm scan, in the order of their calls; norm_scan.hpp explains the algorithm.
/// Ranks exchange results between the steps. On a sharded layer a step reads no chunk of another
/// rank, and writes that chunk's results as zero bits:
///
/// - `read_chunks(B, norm_scan, layer, buffers, scratch)`: reads the keys once. Writes `statistics`
///   of every chunk. O(q_heads * window * tokens * head_dim).
///
/// - `normalise_rows(B, norm_scan, layer, buffers, scratch)`: requires `statistics` of all ranks.
///   Writes `rows`. For a mean over several rows it reads the keys again and overwrites
///   `statistics`, from which the energies of chunks are then found. O(q_heads * window * chunks),
///   or as read_chunks.
///
/// - `norm_curve(B, norm_scan, layer, buffers, scratch)`: requires `statistics` of all ranks.
///   Writes `norms` [sequence, group, chunk]. The entry of a chunk of candidates is the norm of a
///   cut at its start, summed over the group's query heads; all other entries are 0. O(q_heads *
///   window * chunks).
///
/// - `crossing_curve(B, norm_scan, layer, buffers, scratch)`: requires `norms` summed over ranks,
///   and scratch unchanged since norm_curve. Reads again the one chunk in which each group's loss
///   crosses the threshold. Writes `chunk_norms` [sequence, group, chunk_tokens]: the norm of a cut
///   at each token of that chunk, 0 past its end. Writes `chunk_masses` of that shape: the largest
///   attention that a row of this rank's heads gives to the candidates before the token. All are 0
///   where there is nothing to decide.
///
/// - `find_cuts(B, norm_scan, layer, buffers, kept)`: requires `chunk_norms` summed over ranks.
///   Writes kept [sequence, group] by `stop`.
///
/// Primitives of all policies:
///
/// - `compact(B, source, kept, mode)`: moves the rows of every (sequence, kv_head) of a kv_source
///   as move_of(kept(s, g), mode) says, also where source and target overlap. g is the kv_head, or
///   0 if kept has one group. Bits are copied unchanged. With kept_positions it gathers the rows of
///   the positions, in their order, into the slots from first_slot(counts(s, h), mode) on. O(rows
///   moved * head_dim).
///
/// - `for_each_sequence(B, count, f)`: calls f(i) for every i in [0, count). i counts sequences, or
///   other items of a policy, which may be more than its sequences. f is a device-callable object;
///   a device runs each i in a thread.
///
/// Primitives of policies that score tokens. Scores are views [sequence, head, capacity]; only
/// entries below tokens(s) are read or written. Quotas are [sequence].
///
/// - `attention_scratch carve_attention_scratch(arena&, B, rows, layer)`, `selection_scratch
///   carve_selection_scratch(arena&, B, layer)`, whose layer may still have its pages,
///   `sharing_scratch carve_sharing_scratch(arena&, B, layer)` and `ranking_scratch
///   carve_ranking_scratch(arena&, B, layer)`: the backend's own scratch for the primitives below
///   that have this parameter.
///
/// - `attention_sums(B, score_rows, layer, scores, counts, scratch)`: writes as a token's score the
///   attention that it receives from the last rows, summed over them. A carried score is kept and
///   the sum is added to it. With as many heads as KV heads, a score is the mean over the query
///   heads of its group; otherwise heads are query heads. NaN stays NaN unless scores are carried.
///   Attention below 2e-36 of a row may count as 0. counts [sequence, kv_head]: sets `undecided` to
///   whether a row without a softmax was left out of carried scores, or there is no row and nothing
///   is carried. O(q_heads * rows * tokens * head_dim).
///
/// - `attention_spread(B, rows, recent, gain, layer, scores, counts, totals, scratch)`: as
///   attention_sums, but for the tokens before the last `recent` only, and with another score: the
///   mean over the rows plus `gain` times their unbiased variance (0 for one row). Writes to totals
///   [sequence, 2] two sums over tokens and query heads: the entropy -a ln(a + 1e-10) of all rows,
///   and the variance. Rows without a softmax are left out. Sets `undecided` to whether one was
///   left out or there is no row. (arXiv 2503.12491, section 4)
///
/// - `pool(B, pooling, quotas, layer, scores, pooled)`: pools scores along the tokens before the
///   quota's recent ones. Recent tokens receive no pooled score, and theirs enter no other.
///   O(tokens * width).
///
/// - `keep_all(B, layer, kept)`: keeps every token. O(tokens).
///
/// - `share_quotas(B, floor, quotas, layer, scores, shared, scratch)`: divides each sequence's
///   quota among its KV heads. Writes shared [sequence, kv_head] = of_head(floor, best). Of all
///   heads' tokens the kv_heads * ranked with the highest scores are chosen; among equals those of
///   lower heads, then earlier ones. `best` is how many of them are the head's. Where the quota
///   holds all tokens, each head has that quota and scores are not read. With NaN in a score the
///   quotas are unspecified, but that of the NaN's head does not hold all tokens, so that
///   top_tokens sees it. O(kv_heads * tokens) expected.
///
/// - `top_tokens(B, quotas, layer, scores, kept, scratch)`: keeps what each KV head's quota says;
///   quotas are a quotas_view. A head that is `undecided` already, or has NaN in a score before the
///   recent tokens, makes its sequence undecided, and all its heads keep all tokens. Scores are not
///   read where the quota holds all tokens. O(tokens) expected.
///
/// - `top_mass(B, share, sink_start, layer, scores, kept, scratch)`: scores are of query heads. For
///   each query head, keeps the fewest tokens whose scores sum to at least `share` of all, among
///   equals the earlier ones. A KV head keeps the union over its query heads. Where a query head's
///   scores are all 0 or any is NaN, its KV head is undecided and keeps all tokens. With sink_start
///   it keeps the set of Twilight's published kernel. O(tokens) expected; with sink_start times the
///   steps of a bisection.
///
/// - `rank_tokens(B, recent, layer, scores, weights, order, norms, scratch)`: writes order
///   [sequence, kv_head, capacity]: the tokens before the last `recent`, sorted by score, lowest
///   first, among equals later ones first. Writes norms [sequence, capacity]: the norm scan's curve
///   along that order. Entry i is the sum over query heads of the root of the summed squared
///   weights [sequence, q_head, capacity] of order[i] and all tokens after it; entries past the
///   last candidate are 0. O(tokens * log(tokens)).
///
/// - `stop_ranked(B, threshold, recent, layer, norms, order, kept, scratch)`: requires `norms`
///   summed over ranks. Cuts each head's order at the largest index whose loss is at most the
///   threshold. Keeps the tokens from there on and the last `recent` ones, or all tokens where
///   nothing can be decided; `undecided` says which.
///
/// - `select_pages(B, pages, tokens, layer, scores, scratch)`: layer is a query_layer, scores are
///   of query heads. Sets the scores of a page's tokens to 0, unless the page is among the best
///   pages that hold `tokens` tokens. A page's rank is the sum over dimensions of the larger
///   product of the last query and the page's two bounds. Pages that the query does not see do not
///   count. (arXiv 2406.10774)
///
/// Primitives of policy::faithful. layer is a valued_layer with `rule.rows` rows or more; grades
/// are [sequence, kv_head, capacity], lost [sequence, sizes + 1], sizes [sequence]. All share one
/// scratch. The primitives after weigh_tokens read what it wrote there:
///
/// - `importance_scratch carve_importance_scratch(arena&, B, rule, layer)`.
///
/// - `weigh_tokens(B, rule, layer, scores, counts, scratch)`: writes scores [sequence, kv_head,
///   capacity], each (peak + last_row * last + prior) * distance * |v| * sigma. `peak` is the mean
///   over the query heads of the largest attention of any row, `last` that of the last row.
///   `distance` is 1 - the cosine of the key and the mean direction of its head's keys (1 for a key
///   that is 0). `sigma` is the root of the mean square, over the `typical` tokens, of the standard
///   deviation over the rows of their logits without mask and position (1 for one row). Sets
///   `undecided` to whether a score, a query or such a logit of the head is not finite, a row has
///   no softmax, or there is no row. O(q_heads * rows * tokens * head_dim).
///
/// - `grade_tokens(B, rule, layer, scores, grades, lost, counts, scratch)`: ranks the candidates of
///   all KV heads together (rule.scope is cut_scope::kv_head) or of each head alone
///   (cut_scope::layer): largest score first, then lower head, then lower position. Size i keeps
///   the first kept_by(i, candidates). Writes lost: the share of all candidates' scores that each
///   size drops; NaN where all scores are 0, 0 where there is no candidate. One undecided head
///   makes its sequence undecided, and all of its tokens stay. O(tokens * log(sizes)) expected.
///
/// - `find_sizes(B, rule, layer, grades, lost, sizes, to, scratch)`: writes sizes(s), the smallest
///   size that is enough. `to` is the memory of the later stand-ins, which it may work in. The
///   error of a size is the mean over the measured rows of the layer of |o' - o| / (|o| + 1e-9). o
///   is the row's output, the sum of its attention times values. o' is its output over the
///   tokens that the size keeps and its stand-ins. O(q_heads * rows * tokens * head_dim).
///
/// - `fit_stand_ins(B, rule, layer, grades, sizes, to, scratch)`: writes the rows that stand in for
///   the tokens that sizes(s) drops. A KV head has one for each block of rule.block positions of
///   which it drops a token, in their order, but none if it drops fewer than 2 tokens in all. With
///   cut_scope::layer all heads have the largest number of any head: a head with fewer divides the
///   dropped tokens of its first blocks, in order and as evenly as possible, among as many rows as
///   that takes. Let a, k and v be of the tokens that a row stands in for, a being the mean over
///   all rows of their attention plus 1e-12, normalised, and S a row's logit without mask and
///   position. The value is sum a v. The key is k0 = sum a k, moved so that its S comes near log
///   sum exp S of these tokens, by ridge regression over the rows. O(q_heads * rows * tokens *
///   head_dim).
///
/// - `keep_grades(B, layer, grades, sizes, kept)`: keeps the tokens whose grade is at most
///   sizes(s). O(tokens).
///
/// - `write_stand_ins(B, source, kept counts, rows, row counts, mode)`: writes rows [sequence,
///   kv_head, stand_in, dim], rounded to the source's type, into the slots from first_stand_in(...)
///   on.
///
/// - `quantise(B, keys, from, int4)` and `bound_pages(B, keys, from, pages)`: see key_index.hpp.
///
/// Primitives that convert a decision for engines, see masks.hpp and pages.hpp:
///
/// - `write_masks(B, kept, mask, keep, drop)`: mask [sequence, group, token], rows contiguous.
///   Writes `keep` for tokens that kept(s, g) keeps and `drop` for all others, also past a
///   sequence's tokens. With kept_positions, masks of every KV head. Writes nothing outside the
///   mask. O(entries of the mask).
///
/// - `plan_pages(B, kept, page_tokens, shared, to)`: kept [sequence, 1]. Writes to.plans(s) = the
///   page_plan of plan_pages; to.compact_ranges(s, 0) = kept if the plan's sinks move, otherwise a
///   range that drops nothing; to.mask_ranges(s, 0) = kept_slots. shared may have no pointer.
///   O(dropped pages).
///
/// - `release_pages(B, plans, shared, table, freed)`: as remove_pages, for each sequence. Entries
///   [first, last) leave the table and those after them shift down. Writes ids that nobody shares
///   to freed.ids, in their order, and updates both counts. Entries past a count are unchanged.
///   O(pages).
///
/// Results do not depend on how the work is divided: equal inputs give equal bits.
template <class Backend>
struct ops;

/// A value that says where and how work runs: on threads, or on a device and a stream.
template <class B>
concept backend = requires(const B& exec, const dense<float, typename ops<B>::memory>& rows,
                           view<const kept_range, 2, typename ops<B>::memory> kept) {
  { ops<B>::compact(exec, rows, kept, compaction::sinks_up) } -> std::same_as<status>;
};

}  // namespace refreekv::inline v0
