// SPDX-License-Identifier: Apache-2.0
// A random batch in pages, and memory for plans and page lists, with canaries around every row.
#pragma once

#include "layouts.hpp"

/// [row, column], with canaries before, between and after the rows, which must not change.
template <class T>
class guarded_rows {
 public:
  guarded_rows(index_t rows, index_t columns, T canary)
      : rows_(rows),
        columns_(columns),
        canary_(canary),
        memory_(size(gap + rows * stride()), canary) {}

  refreekv::view<T, 2> get() { return {memory_.data() + gap, {rows_, columns_}, {stride(), 1}}; }
  refreekv::view<T, 1> column() { return {memory_.data() + gap, {rows_}, {stride()}}; }
  refreekv::view<T, 3> in_groups(index_t groups) {
    return {
        memory_.data() + gap, {rows_ / groups, groups, columns_}, {groups * stride(), stride(), 1}};
  }

  bool intact() const {
    for (index_t i = 0; i < static_cast<index_t>(memory_.size()); ++i) {
      const bool outside = i < gap || (i - gap) % stride() >= columns_;
      if (outside && !same(memory_[size(i)], canary_)) return false;
    }
    return true;
  }
  bool unwritten() const {
    return std::all_of(memory_.begin(), memory_.end(), [&](T x) { return same(x, canary_); });
  }
  friend bool operator==(const guarded_rows& a, const guarded_rows& b) {
    return std::equal(a.memory_.begin(), a.memory_.end(), b.memory_.begin(), b.memory_.end(), same);
  }

 private:
  static constexpr index_t gap = 3;

  index_t stride() const { return columns_ + gap; }

  static bool same(const T& a, const T& b) {
    if constexpr (std::is_same_v<T, refreekv::page_plan>) {
      return a.first == b.first && a.last == b.last && a.freed == b.freed &&
             a.sinks_move == b.sinks_move && a.first_slot == b.first_slot &&
             a.written_first == b.written_first && a.written_last == b.written_last;
    } else if constexpr (std::is_same_v<T, refreekv::kept_range>) {
      return a == b;
    } else {
      return std::memcmp(&a, &b, sizeof a) == 0;
    }
  }

  index_t rows_, columns_;
  T canary_;
  std::vector<T> memory_;
};

/// How many of a batch's pages are shared.
enum class sharing { unknown, none, prefixes, some, all };

/// Sequences of at most `most_pages` pages, with spare room in their page tables, and one decision
/// per sequence.
template <class Index>
struct page_batch {
  static constexpr refreekv::kept_range no_range{-7, -7, -7, -7, -7};

  index_t page_tokens, sequences, width, pool_pages;
  refreekv::shared_pages_view<> shared;
  guarded_rows<refreekv::kept_range> kept, moves, slots;
  guarded_rows<refreekv::page_plan> plans;
  guarded_rows<Index> ids, freed_ids;
  guarded_rows<position_t> counts, freed_counts;

  page_batch(random_source& random, index_t tokens_of_page, index_t rows, index_t most_pages,
             sharing how)
      : page_tokens(tokens_of_page),
        sequences(rows),
        width(most_pages + 2),
        pool_pages(rows * width + 5),
        kept(rows, 1, no_range),
        moves(rows, 1, no_range),
        slots(rows, 1, no_range),
        plans(rows, 1, {-7, -7, -7, false, -7, -7, -7}),
        ids(rows, width, -7),
        freed_ids(rows, width, -7),
        counts(rows, 1, -7),
        freed_counts(rows, 1, -7),
        bits_(size(rows * ((width + 7) / 8) + 1)) {
    std::vector<Index> pool(size(pool_pages));
    std::iota(pool.begin(), pool.end(), Index{0});
    std::shuffle(pool.begin(), pool.end(), random.engine());
    for (index_t s = 0; s < sequences; ++s) {
      const auto tokens = static_cast<position_t>(length(random, most_pages));
      const index_t pages = (tokens + page_tokens - 1) / page_tokens;
      kept.get()(s, 0) = range(random, tokens);
      counts.column()(s) = static_cast<position_t>(pages + random.between(0, 2));
      for (index_t p = 0; p < counts.column()(s); ++p) {
        ids.get()(s, p) = pool.back();
        pool.pop_back();
      }
      const index_t prefix = random.between(0, pages);
      for (index_t p = 0; p < width; ++p) {
        const bool is = how == sharing::all || (how == sharing::some && random.chance(0.1)) ||
                        (how == sharing::prefixes && p < prefix);
        if (is) bits_[size(s * ((width + 7) / 8) + p / 8)] |= static_cast<std::uint8_t>(1 << p % 8);
      }
    }
    if (how != sharing::unknown) shared = {bits_.data(), {sequences, (width + 7) / 8}};
  }
  page_batch(const page_batch&) = delete;
  page_batch& operator=(const page_batch&) = delete;

  refreekv::page_plans<> plan() { return {plans.column(), moves.get(), slots.get()}; }
  refreekv::page_lists<Index> table() { return {ids.get(), counts.column()}; }
  refreekv::page_lists<Index> freed() { return {freed_ids.get(), freed_counts.column()}; }

  bool intact() const {
    return kept.intact() && moves.intact() && slots.intact() && plans.intact() && ids.intact() &&
           freed_ids.intact() && counts.intact() && freed_counts.intact();
  }
  /// Whether nothing but the page table was written.
  bool unwritten() const {
    return moves.unwritten() && slots.unwritten() && plans.unwritten() && freed_ids.unwritten() &&
           freed_counts.unwritten();
  }
  friend bool operator==(const page_batch& a, const page_batch& b) {
    return a.kept == b.kept && a.moves == b.moves && a.slots == b.slots && a.plans == b.plans &&
           a.ids == b.ids && a.freed_ids == b.freed_ids && a.counts == b.counts &&
           a.freed_counts == b.freed_counts;
  }

 private:
  index_t length(random_source& random, index_t most_pages) const {
    const index_t pages = random.between(0, most_pages);
    const index_t more = random.one_of<index_t>({-1, 0, 0, 1, page_tokens / 2});
    return std::clamp<index_t>(pages * page_tokens + more, 0, most_pages * page_tokens);
  }
  static refreekv::kept_range range(random_source& random, position_t tokens) {
    const auto at_most = [&](index_t n) { return static_cast<position_t>(random.between(0, n)); };
    const position_t sinks =
        std::min(tokens, random.one_of<position_t>({0, 1, 4, 4, 4, at_most(tokens)}));
    const position_t cut =
        random.one_of<position_t>({sinks, tokens, sinks + at_most(tokens - sinks),
                                   std::max<position_t>(sinks, tokens - at_most(tokens / 8))});
    return {sinks, cut, tokens, 0.25f, 0.5f};
  }

  std::vector<std::uint8_t> bits_;
};
