// SPDX-License-Identifier: Apache-2.0
// faithful (ours): no budget; a layer keeps what its outputs need, divided among its KV heads.
//
// A token's score is (peak + last_row * last + prior) * distance * |v| * sigma:
// - peak: the largest attention that any row of the window gives the token; last: that of the last
//   row; prior: a floor for tokens that the window never attended to;
// - distance: how far the token's key lies from the other keys; |v|: the length of its value;
// - sigma: how much the logits of its head vary from row to row.
// One ranking holds the tokens of all KV heads of a layer. The dropped tokens of each block of
// positions are replaced by one row, their stand-in. A layer keeps the smallest of its sizes at
// which sqrt(error * lost) <= tolerance. error is the relative error of the window's outputs, lost
// the share of the scores that is dropped.
#pragma once

#include "refreekv/attention/valued_layer.hpp"
#include "refreekv/cache/aliasing.hpp"
#include "refreekv/policy/policy.hpp"

namespace refreekv::inline v0::policy {

/// Requires a layer from with_values(...), because it reads values as well as keys.
struct faithful {
  template <class Memory>
  using decision = kept_with_stand_ins<Memory>;

  /// Largest sqrt(error * lost), or largest lost if error_term is false: 0.2 is then as strict as
  /// 0.1 is with it. At 0 all tokens stay.
  double tolerance = 0.1;
  /// First tokens that always stay. If a cache is pruned again, include all tokens that an earlier
  /// decision kept, and its stand-ins: tokens that are judged twice lose twice.
  count_t sinks = 4;
  /// Last tokens that always stay: at most a quarter of the sequence, but at least one token.
  count_t recent = 8;
  count_t window = 32;  ///< last queries that score tokens, at least 1; if fewer, all
  /// Weight of the last query's attention relative to the largest of any query, in [0, 100].
  double last_row = 2;
  /// Attention that is added to every token's, in [1e-6, 1], because the next queries are not those
  /// of the window.
  double prior = 0.02;
  count_t block = 64;  ///< positions that share a stand-in, in [1, 256]
  count_t sizes = 16;  ///< number of sizes that a layer chooses from, in [1, 64]
  /// The error is measured on the last row, and on every error_rows-th before it.
  count_t error_rows = 4;
  double ridge = 0.05;  ///< of the ridge regression that fits the stand-ins' keys, in [1e-6, 1]
  /// Whether rows stand in for dropped tokens. If false, a decision is kept positions alone.
  bool stand_ins = true;
  bool error_term = true;  ///< if false, lost alone decides, which takes half the time
  /// kv_head: one ranking for the layer; KV heads keep different numbers of tokens. layer: all KV
  /// heads keep the same number, for engines with one length for each layer, at a cost in fidelity.
  cut_scope scope = cut_scope::kv_head;

  static constexpr const char* name = "faithful";
  static constexpr std::tuple options{
      option{"tolerance", &faithful::tolerance, "largest sqrt(error * lost scores) of a layer",
             any_share},
      option{"sinks", &faithful::sinks, "first tokens that always stay"},
      option{"recent", &faithful::recent, "last tokens that stay"},
      option{"window", &faithful::window, "last queries to look at", at_least_one},
      option{"last_row", &faithful::last_row, "weight of the last query beside the window's peak",
             option_range{0, 100, "in [0, 100]"}},
      option{"prior", &faithful::prior, "attention that every token counts as having had",
             option_range{1e-6, 1, "in [1e-6, 1]"}},
      option{"block", &faithful::block, "positions that share a stand-in",
             option_range{1, chunk_tokens, "in [1, 256]"}},
      option{"sizes", &faithful::sizes, "sizes that a layer chooses from",
             option_range{1, max_sizes, "in [1, 64]"}},
      option{"error_rows", &faithful::error_rows,
             "every so many rows, from the last back, measure the error", at_least_one},
      option{"ridge", &faithful::ridge, "of the regression that finds the keys of stand-ins",
             option_range{1e-6, 1, "in [1e-6, 1]"}},
      option{"stand_ins", &faithful::stand_ins, "rows stand in for dropped tokens"},
      option{"error_term", &faithful::error_term, "the error of the outputs decides, too"},
      option{"scope", &faithful::scope, "kv_head: KV heads keep different numbers of tokens"}};

  /// Null, or why stand-ins are impossible: ALiBi needs their position, or values are a part of the
  /// keys (MLA). Always null if stand_ins is false. O(1).
  template <attention_layer Layer>
    requires requires(const Layer& layer) { layer.values; }
  [[nodiscard]] constexpr const char* invalid(const Layer& layer) const noexcept {
    if (!stand_ins) return nullptr;
    if (layer.info.attention.alibi_slopes.data() != nullptr) {
      return "stand-ins have no position, which ALiBi needs: set stand_ins = false";
    }
    if (detail::share_memory(layer.keys, layer.values) != nullptr) {
      return "values are a part of the keys (MLA), where no row can stand in for both: set "
             "stand_ins = false";
    }
    return nullptr;
  }

  /// Null, or what is wrong with the caller's memory for stand-ins: it is missing, or its counts or
  /// rows have the wrong shape. O(1).
  template <attention_layer Layer>
  [[nodiscard]] constexpr const char* invalid(
      const Layer& layer, const decision<typename Layer::memory>& kept) const noexcept {
    const auto& [keys, values, counts] = kept.stand_ins;
    if (!kept.stand_ins.wanted()) {
      if (!stand_ins || layer.sequences() == 0) return nullptr;
      return "no memory for stand-ins: pass kept_with_stand_ins, or set stand_ins = false";
    }
    if (counts.extent(0) != layer.sequences() || counts.extent(1) != layer.kv_heads()) {
      return "stand-in counts must be [sequence, kv_head]";
    }
    if (!stand_ins) return nullptr;
    const index_t most = most_stand_ins(layer.capacity());
    if (const char* why = detail::misshapen_rows(keys, counts, layer.head_dim(), most)) return why;
    return detail::misshapen_rows(values, counts, layer.values.shape().head_dim, most);
  }

  /// The largest number of stand-ins of a KV head with `tokens` tokens: one for each block, or 0 if
  /// stand_ins is false. O(1).
  [[nodiscard]] constexpr index_t most_stand_ins(index_t tokens) const noexcept {
    return stand_ins ? (tokens + block - 1) / block : 0;
  }

  template <class Backend>
  struct buffers {
    float* scores;      ///< [sequence, kv_head, capacity]
    grade* grades;      ///< [sequence, kv_head, capacity]
    double* lost;       ///< [sequence, sizes + 1]: share of the scores that each size drops
    position_t* sizes;  ///< [sequence]
    typename ops<Backend>::importance_scratch scratch;
  };

  template <backend Backend, attention_layer Layer>
    requires requires(const Layer& layer) { layer.values; }
  [[nodiscard]] buffers<Backend> carve(arena& from, const Backend& exec,
                                       const Layer& layer) const noexcept {
    const index_t sequences = layer.sequences(), kv_heads = layer.kv_heads();
    return {from.array<float>(sequences, kv_heads, layer.capacity()),
            from.array<grade>(sequences, kv_heads, layer.capacity()),
            from.array<double>(sequences, index_t{sizes} + 1), from.array<position_t>(sequences),
            ops<Backend>::carve_importance_scratch(from, exec, rule(layer), layer)};
  }

  /// Writes the kept tokens and the stand-ins. Ranks with different heads of a layer decide
  /// independently: each divides what its own heads need among these. Nothing is reduced.
  template <backend Backend, attention_layer Layer>
  status select(const Backend& exec, const Layer& layer, const buffers<Backend>& work,
                const decision<typename Layer::memory>& kept,
                const head_reduction auto&) const noexcept {
    using run = ops<Backend>;
    using memory = typename Layer::memory;
    const importance_rule own = rule(layer);
    const index_t sequences = layer.sequences(), kv_heads = layer.kv_heads();
    const scores_view<memory> scores(work.scores, {sequences, kv_heads, layer.capacity()});
    const view<grade, 3, memory> grades(work.grades, {sequences, kv_heads, layer.capacity()});
    status s = run::weigh_tokens(exec, own, layer, scores, kept.counts, work.scratch);
    if (s == status::ok) {
      s = run::grade_tokens(exec, own, layer, scores, grades, work.lost, kept.counts, work.scratch);
    }
    if (s == status::ok) {
      s = run::find_sizes(exec, own, layer, grades, work.lost, work.sizes, kept.stand_ins,
                          work.scratch);
    }
    if (s == status::ok && stand_ins) {
      s = run::fit_stand_ins(exec, own, layer, grades, work.sizes, kept.stand_ins, work.scratch);
    }
    if (s == status::ok && !stand_ins && kept.stand_ins.wanted()) {
      // An earlier decision may have left counts above 0.
      s = run::for_each_sequence(exec, sequences, clear_counts<memory>{kept.stand_ins.counts});
    }
    if (s == status::ok) s = run::keep_grades(exec, layer, grades, work.sizes, kept);
    return s;
  }

  template <class Memory>
  struct clear_counts {  // public, because device code requires it
    view<position_t, 2, Memory> counts;
    REFREEKV_HOST_DEVICE constexpr void operator()(index_t s) const noexcept {
      for (index_t h = 0; h < counts.extent(1); ++h) counts(s, h) = 0;
    }
  };

 private:
  template <class Layer>
  [[nodiscard]] constexpr importance_rule rule(const Layer& layer) const noexcept {
    return {.tolerance = tolerance,
            .rows = detail::most_rows(layer, window),
            .sinks = sinks,
            .recent = recent,
            .block = block,
            .sizes = sizes,
            .error_rows = error_rows,
            .last_row = last_row,
            .prior = prior,
            .ridge = ridge,
            .stand_ins = stand_ins,
            .error_term = error_term,
            .scope = scope};
  }
};

}  // namespace refreekv::inline v0::policy
