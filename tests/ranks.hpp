// SPDX-License-Identifier: Apache-2.0
// Ranks in one process: threads, each with its part of a problem, joined by an all-reduce.
#pragma once

#include <barrier>
#include <thread>

#include "layouts.hpp"
#include "selection.hpp"

/// An all-reduce of `ranks` threads, which adds in the order of the ranks.
class rank_group {
 public:
  explicit rank_group(index_t ranks)
      : barrier_(static_cast<std::ptrdiff_t>(ranks)), shares_(size(ranks)), counts_(size(ranks)) {}

  /// Replaces values [count] by the sum over the ranks. They are the bits of a T; their type may be
  /// any of T's size. Returns whether all ranks have the same count.
  template <class T>
  bool sum(index_t rank, T* values, index_t count) {
    shares_[size(rank)] = values;
    counts_[size(rank)] = count;
    barrier_.arrive_and_wait();
    std::vector<T> total(size(count)), share(size(count));
    bool equal = true;
    for (std::size_t r = 0; r < shares_.size(); ++r) {
      equal = equal && counts_[r] == count;
      if (!equal || count == 0) continue;
      std::memcpy(share.data(), shares_[r], share.size() * sizeof(T));
      for (std::size_t i = 0; i < total.size(); ++i) {
        is_exclusive_ = is_exclusive_ && (share[i] == 0 || total[i] == 0);
        total[i] += share[i];
      }
    }
    barrier_.arrive_and_wait();
    if (count > 0) std::memcpy(values, total.data(), total.size() * sizeof(T));
    return equal;
  }

  /// Whether no two ranks ever had a non-zero value at the same index.
  bool is_exclusive() const { return is_exclusive_; }

 private:
  std::barrier<> barrier_;
  std::vector<const void*> shares_;
  std::vector<index_t> counts_;
  std::atomic<bool> is_exclusive_{true};
};

/// The head_reduction of a rank that has some of the heads (tensor parallel).
struct head_link {
  rank_group* group;
  index_t rank;

  refreekv::status operator()(double* sums, index_t count) const {
    return group->sum(rank, sums, count) ? refreekv::status::ok : refreekv::status::device_error;
  }
};
/// The token_exchange of a rank that has some of the tokens (context parallel).
struct token_link {
  rank_group* group;
  index_t rank;

  refreekv::status operator()(std::uint32_t* words, index_t count) const {
    return group->sum(rank, words, count) ? refreekv::status::ok : refreekv::status::device_error;
  }
};
/// Both collectives, for a rank that has some of the heads and some of the tokens.
struct grid_link : head_link, token_link {
  using head_link::operator();
  using token_link::operator();
};

/// Runs f(rank) for all ranks concurrently, one thread per rank.
template <class F>
void run_ranks(index_t ranks, const F& f) {
  std::vector<std::thread> others;
  for (index_t rank = 1; rank < ranks; ++rank) others.emplace_back(f, rank);
  f(index_t{0});
  for (std::thread& other : others) other.join();
}

/// Returns what select decides on a rank. Checks nothing, unlike run_select, because Catch2's
/// assertions are not thread-safe.
template <class Policy, class Backend, class Layer, class Join>
selection select_on_rank(const Policy& policy, const Backend& exec, const Layer& layer,
                         const Join& join) {
  selection s{{}, policy.groups(layer), {}};
  s.kept.resize(size(layer.sequences() * s.groups));
  std::vector<std::byte> scratch(refreekv::workspace_size(policy, exec, layer), std::byte{0xA5});
  s.status = refreekv::select(policy, exec, layer, {s.kept.data(), {layer.sequences(), s.groups}},
                              scratch, join);
  return s;
}

/// The part of a problem with KV heads [first, last) and their query heads.
inline problem heads_of(const problem& p, index_t first, index_t last) {
  problem part(last - first, p.group, p.head_dim, p.window, p.lengths);
  part.scale = p.scale;
  part.soft_cap = p.soft_cap;
  part.sliding_window = p.sliding_window;
  const auto slice = [&](const std::vector<float>& per_head) {
    if (per_head.empty()) return per_head;
    return std::vector(per_head.begin() + first * p.group, per_head.begin() + last * p.group);
  };
  part.alibi_slopes = slice(p.alibi_slopes);
  part.sink_logits = slice(p.sink_logits);
  for (index_t s = 0; s < p.sequences(); ++s) {
    for (index_t d = 0; d < p.head_dim; ++d) {
      for (index_t h = 0; h < last - first; ++h) {
        for (index_t t = 0; t < p.lengths[size(s)]; ++t) {
          part.keys.at(s, h, t, d) = p.keys.at(s, first + h, t, d);
        }
      }
      for (index_t r = 0; r < p.window; ++r) {
        for (index_t h = 0; h < part.q_heads(); ++h) {
          part.query(s, r, h, d) = p.query(s, r, first * p.group + h, d);
        }
      }
    }
  }
  return part;
}
