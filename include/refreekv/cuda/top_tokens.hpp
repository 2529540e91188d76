// SPDX-License-Identifier: Apache-2.0
// Choosing tokens by score on a device: the best ones, or those that hold a share of the sum.
#pragma once

#include "refreekv/cuda/value_limit.hpp"
#include "refreekv/kept_positions.hpp"
#include "refreekv/norm_scan.hpp"
#include "refreekv/scores.hpp"
#include "refreekv/workspace.hpp"

namespace refreekv::inline v0::cuda_detail {

struct selection_scratch {
  value_limit* limits;  ///< [sequence, q_head]
  float* page_scores;   ///< [sequence, q_head, page]; null where no bounds of pages are observed

  template <class Seen>
  [[nodiscard]] static selection_scratch take(arena& from, const Seen& seen) noexcept {
    selection_scratch s{from.take<value_limit>(seen.sequences(), seen.q_heads()), nullptr};
    if constexpr (requires { seen.pages; }) {
      s.page_scores =
          from.take<float>(seen.sequences(), seen.q_heads(), seen.pages.bounds.extent(2));
    }
    return s;
  }
};

/// The tokens before the last `recent`.
template <class Seen>
[[nodiscard]] REFREEKV_DEVICE index_t candidates_of(const Seen& seen, index_t sequence,
                                                    index_t recent) noexcept {
  const index_t tokens = seen.tokens(sequence);
  return tokens > recent ? tokens - recent : 0;
}

/// Keeps those of one head's tokens [0, candidates) for which holds(t), and all after them.
template <class Memory, thread_block Block, class Predicate>
REFREEKV_DEVICE void keep_where(Block& block, warp_values<std::uint64_t>& shared,
                                const kept_positions<Memory>& kept, index_t sequence, index_t head,
                                index_t candidates, index_t tokens,
                                const Predicate& holds) noexcept {
  position_t* to = kept.positions.at(sequence, head);
  const index_t stride = kept.positions.stride(2);
  const auto write = [&](index_t i, index_t t) { to[stride * i] = static_cast<position_t>(t); };
  const index_t held = for_each_where(block, shared, candidates, holds, write);
  for (index_t t = candidates + block.rank(); t < tokens; t += block_threads) {
    write(held + t - candidates, t);
  }
  if (block.rank() == 0) {
    kept.counts(sequence, head) = {static_cast<position_t>(held + tokens - candidates),
                                   static_cast<position_t>(tokens)};
  }
}

/// Keeps all of one head.
template <class Memory, thread_block Block>
REFREEKV_DEVICE void keep_tokens(const Block& block, const kept_positions<Memory>& kept,
                                 index_t sequence, index_t head, index_t tokens,
                                 bool undecided = false) noexcept {
  for (index_t t = block.rank(); t < tokens; t += block_threads) {
    kept.positions(sequence, head, t) = static_cast<position_t>(t);
  }
  if (block.rank() == 0) {
    kept.counts(sequence, head) = {static_cast<position_t>(tokens), static_cast<position_t>(tokens),
                                   undecided};
  }
}

template <class Seen>
struct keep_all_body {
  struct shared {};
  Seen seen;
  kept_positions<typename Seen::memory> kept;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.kv_heads();
  }

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t sequence = item / seen.kv_heads();
    keep_tokens(block, kept, sequence, item % seen.kv_heads(), seen.tokens(sequence));
  }
};

template <class Backend, class Seen>
[[nodiscard]] status keep_all(const Backend& on, const Seen& seen,
                              const kept_positions<typename Seen::memory>& kept) noexcept {
  const keep_all_body<Seen> body{seen, kept};
  return run_blocks(on, body.items(), body);
}

/// Keeps a head's best and most recent tokens.
template <class Seen>
struct top_tokens_body {
  using memory = typename Seen::memory;
  using shared = limit_memory<count_bins>;
  const token_quota* quotas;
  Seen seen;
  scores_view<memory> scores;
  kept_positions<memory> kept;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.kv_heads();
  }

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t sequence = item / seen.kv_heads(), head = item % seen.kv_heads();
    const index_t tokens = seen.tokens(sequence);
    const token_quota quota = quotas[sequence];
    const index_t candidates = candidates_of(seen, sequence, quota.recent);
    if (!block.sync_and(!kept.counts(sequence, head).undecided)) return;
    if (quota.ranked >= candidates) return keep_tokens(block, kept, sequence, head, tokens);
    const value_row row{scores.at(sequence, head), scores.stride(2)};
    if (any_nan(block, row, candidates)) {
      if (block.rank() == 0) kept.counts(sequence, head).undecided = true;
      return;
    }
    const value_limit limit = quota.ranked > 0
                                  ? limit_of_largest(block, s, row, candidates, quota.ranked)
                                  : value_limit::nothing();
    keep_where(block, s.counts, kept, sequence, head, candidates, tokens,
               [&](index_t t) { return limit.takes(row(t), t); });
  }
};

/// Keeps all of a sequence of which a head is undecided.
template <class Seen>
struct keep_undecided_body {
  struct shared {};
  Seen seen;
  kept_positions<typename Seen::memory> kept;

  /// item: sequence
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t sequence) const noexcept {
    const index_t heads = seen.kv_heads();
    bool decided = true;
    for (index_t h = block.rank(); h < heads; h += block_threads) {
      decided = decided && !kept.counts(sequence, h).undecided;
    }
    if (block.sync_and(decided)) return;
    for (index_t h = 0; h < heads; ++h) {
      keep_tokens(block, kept, sequence, h, seen.tokens(sequence), true);
    }
  }
};

template <class Backend, class Seen>
[[nodiscard]] status top_tokens(const Backend& on, const token_quota* quotas, const Seen& seen,
                                const scores_view<typename Seen::memory>& scores,
                                const kept_positions<typename Seen::memory>& kept,
                                const selection_scratch&) noexcept {
  const top_tokens_body<Seen> body{quotas, seen, scores, kept};
  const status s = run_blocks(on, body.items(), body);
  if (s != status::ok) return s;
  return run_blocks(on, seen.sequences(), keep_undecided_body<Seen>{seen, kept});
}

/// Finds which scores of a query head hold a share of their sum.
template <class Seen>
struct mass_limits_body {
  struct shared {
    warp_values<double> sums;
    limit_memory<mass_bins> least;
    bisection_memory bisection;
  };
  double share;
  bool sink_start;
  Seen seen;
  scores_view<typename Seen::memory> scores;
  value_limit* limits;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.q_heads();
  }

  /// item: [sequence, q_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t sequence = item / seen.q_heads();
    const index_t tokens = seen.tokens(sequence);
    if (tokens == 0) return;
    const value_row row{scores.at(sequence, item % seen.q_heads()), scores.stride(2)};
    const value_limit limit = limit_of(block, s, row, tokens);
    if (block.rank() == 0) limits[item] = limit;
  }

 private:
  template <thread_block Block>
  REFREEKV_DEVICE value_limit limit_of(Block& block, shared& s, const value_row& row,
                                       index_t tokens) const noexcept {
    double sum = 0;
    for_each_value(block, row, tokens, [&](float v) { sum += double{v}; });
    sum = block_reduce(block, s.sums, sum, plus{});
    if (!norm_scan::decidable(sum)) return value_limit::everything();
    return sink_start ? limit_of_bisection(block, s.bisection, row, tokens,
                                           static_cast<float>(1 / sum), static_cast<float>(share))
                      : limit_of_sum(block, s.least, row, tokens, sum, share * sum);
  }
};

/// Keeps what any query head of a KV head takes.
template <class Seen>
struct keep_union_body {
  using memory = typename Seen::memory;
  using shared = warp_values<std::uint64_t>;
  Seen seen;
  scores_view<memory> scores;
  const value_limit* limits;
  kept_positions<memory> kept;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.kv_heads();
  }

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t sequence = item / seen.kv_heads(), head = item % seen.kv_heads();
    const index_t group = seen.q_heads() / seen.kv_heads(), tokens = seen.tokens(sequence);
    bool decided = true;
    for (index_t g = 0; g < group; ++g) {
      decided = decided && !limits[item * group + g].takes_everything();
    }
    if (tokens > 0 && !decided) return keep_tokens(block, kept, sequence, head, tokens, true);
    const float* first = scores.at(sequence, head * group);
    keep_where(block, s, kept, sequence, head, tokens, tokens, [&](index_t t) {
      bool taken = false;
      for (index_t g = 0; g < group; ++g) {
        const float score = first[g * scores.stride(1) + t * scores.stride(2)];
        taken |= limits[item * group + g].takes(score, t);
      }
      return taken;
    });
  }
};

template <class Backend, class Seen>
[[nodiscard]] status top_mass(const Backend& on, double share, bool sink_start, const Seen& seen,
                              const scores_view<typename Seen::memory>& scores,
                              const kept_positions<typename Seen::memory>& kept,
                              const selection_scratch& scratch) noexcept {
  const mass_limits_body<Seen> limits{share, sink_start, seen, scores, scratch.limits};
  const status s = run_blocks(on, limits.items(), limits);
  if (s != status::ok) return s;
  const keep_union_body<Seen> keep{seen, scores, scratch.limits, kept};
  return run_blocks(on, keep.items(), keep);
}

}  // namespace refreekv::inline v0::cuda_detail
