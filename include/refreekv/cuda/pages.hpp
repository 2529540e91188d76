// SPDX-License-Identifier: Apache-2.0
// Masks and page tables of a batch, on a device.
#pragma once

#include "refreekv/cuda/block/block.hpp"
#include "refreekv/decision/kept_positions.hpp"
#include "refreekv/decision/page_lists.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Number of mask tokens that one block writes.
inline constexpr index_t mask_tokens = 8 * block_threads;

[[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t mask_tiles(index_t tokens) noexcept {
  return (tokens + mask_tokens - 1) / mask_tokens;
}

/// The tokens [begin, end) of one mask row that an item writes.
template <class T>
struct mask_tile {
  index_t sequence;
  index_t group;
  index_t begin;
  index_t end;
  T* row;
};

template <class T, class Memory>
[[nodiscard]] REFREEKV_DEVICE mask_tile<T> mask_tile_of(const view<T, 3, Memory>& mask,
                                                        index_t item) noexcept {
  const index_t tokens = mask.extent(2), tiles = mask_tiles(tokens);
  const index_t sequence = item / tiles / mask.extent(1), group = item / tiles % mask.extent(1);
  const index_t begin = item % tiles * mask_tokens;
  const index_t end = tokens - begin < mask_tokens ? tokens : begin + mask_tokens;
  return {sequence, group, begin, end, mask.at(sequence, group)};
}

/// Range decisions: writes one mask tile. An item is a tile.
template <class T, class Memory>
struct range_masks_body {
  struct shared {};

  view<const kept_range, 2, Memory> kept;
  view<T, 3, Memory> mask;
  T keep;
  T drop;

  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const mask_tile<T> tile = mask_tile_of(mask, item);
    const kept_range k = kept(tile.sequence, tile.group);
    for (index_t t = tile.begin + block.rank(); t < tile.end; t += block_threads) {
      tile.row[t] = t < k.tokens && k.keeps(t) ? keep : drop;
    }
  }
};

/// Position decisions: writes one mask tile. An item is a tile.
template <class T, class Memory>
struct position_masks_body {
  struct shared {};

  kept_positions<Memory> kept;
  view<T, 3, Memory> mask;
  T keep;
  T drop;

  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const mask_tile<T> tile = mask_tile_of(mask, item);
    for (index_t t = tile.begin + block.rank(); t < tile.end; t += block_threads) {
      tile.row[t] = drop;
    }
    const index_t count = kept.counts(tile.sequence, tile.group).count;
    const auto position = [&](index_t i) {
      return index_t{kept.positions(tile.sequence, tile.group, i)};
    };
    index_t first = 0;  // index of the first kept position in the tile, by bisection
    for (index_t last = count; first < last;) {
      const index_t middle = first + (last - first) / 2;
      if (position(middle) < tile.begin) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    block.sync();  // the tile is dropped as a whole before kept tokens are set
    for (index_t i = first + block.rank(); i < count; i += block_threads) {
      if (position(i) >= tile.end) break;
      tile.row[position(i)] = keep;
    }
  }
};

template <class Backend, class T, class Memory>
[[nodiscard]] status write_masks(const Backend& exec, const view<const kept_range, 2, Memory>& kept,
                                 const view<T, 3, Memory>& mask, T keep, T drop) noexcept {
  const index_t rows = mask.extent(0) * mask.extent(1);
  return run_blocks(exec, rows * mask_tiles(mask.extent(2)),
                    range_masks_body<T, Memory>{kept, mask, keep, drop});
}

template <class Backend, class T, class Memory>
[[nodiscard]] status write_masks(const Backend& exec, const kept_positions<Memory>& kept,
                                 const view<T, 3, Memory>& mask, T keep, T drop) noexcept {
  const index_t rows = mask.extent(0) * mask.extent(1);
  return run_blocks(exec, rows * mask_tiles(mask.extent(2)),
                    position_masks_body<T, Memory>{kept, mask, keep, drop});
}

/// Counts the pages in [first, last) that are not shared with another sequence; computed by the
/// whole block.
template <thread_block Block>
[[nodiscard]] REFREEKV_DEVICE index_t private_pages(Block& block, warp_values<index_t>& sums,
                                                    shared_pages shared, index_t first,
                                                    index_t last) noexcept {
  if (shared == nullptr) return last - first;
  index_t count = 0;
  for (index_t page = first + block.rank(); page < last; page += block_threads) {
    count += is_shared(shared, page) ? 0 : 1;
  }
  return block_reduce(block, sums, count, plus{});
}

/// Plans the pages of one sequence. An item is a sequence.
template <class Memory>
struct plan_pages_body {
  struct shared {
    warp_values<index_t> sums;
  };

  view<const kept_range, 2, Memory> kept;
  index_t page_tokens;
  shared_pages_view<Memory> bits;
  page_plans<Memory> to;

  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t sequence) const noexcept {
    const kept_range k = kept(sequence, 0);
    const detail::page_choice choice = detail::choose_pages(k, page_tokens);
    const shared_pages own_bits = detail::shared_by(bits, sequence);
    const auto count = [&](index_t first, index_t last) {
      return private_pages(block, s.sums, own_bits, first, last);
    };
    const index_t stay = count(choice.stay.first, choice.stay.last);
    const index_t move = count(0, choice.move.last);
    const index_t written = count(choice.move.written_first, choice.move.written_last);
    const page_plan plan = choice.best(stay, move, written);
    if (block.rank() == 0) {
      to.plans(sequence) = plan;
      to.compact_ranges(sequence, 0) = detail::sink_moves(k, plan);
      to.mask_ranges(sequence, 0) = kept_slots(k, plan, page_tokens);
    }
  }
};

template <class Backend, class Memory>
[[nodiscard]] status plan_pages(const Backend& exec, const view<const kept_range, 2, Memory>& kept,
                                index_t page_tokens, const shared_pages_view<Memory>& shared,
                                const page_plans<Memory>& to) noexcept {
  return run_blocks(exec, kept.extent(0), plan_pages_body<Memory>{kept, page_tokens, shared, to});
}

/// Removes a plan's pages from one sequence's table. An item is a sequence.
template <class Index, class Memory>
struct release_pages_body {
  struct shared {
    warp_values<int> sums;
  };

  view<const page_plan, 1, Memory> plans;
  shared_pages_view<Memory> bits;
  page_lists<Index, Memory> table;
  page_lists<Index, Memory> freed;

  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t sequence) const noexcept {
    const page_plan plan = plans(sequence);
    const index_t pages = table.counts(sequence);
    Index* ids = table.ids.at(sequence);
    const index_t count = list_freed(block, s, plan, ids, sequence);
    block.sync();  // every thread has read the old number of pages
    shift(block, ids, plan.first, plan.last, pages);
    if (block.rank() == 0) {
      freed.counts(sequence) = static_cast<position_t>(count);
      table.counts(sequence) = static_cast<position_t>(pages - (plan.last - plan.first));
    }
  }

 private:
  /// Appends the plan's pages that are not shared to `freed`, in table order. Returns their number.
  template <thread_block Block>
  REFREEKV_DEVICE index_t list_freed(Block& block, shared& s, const page_plan& plan,
                                     const Index* ids, index_t sequence) const noexcept {
    const shared_pages own_bits = detail::shared_by(bits, sequence);
    Index* to = freed.ids.at(sequence);
    index_t count = 0;
    for (index_t first = plan.first; first < plan.last; first += block_threads) {
      const index_t page = first + block.rank();
      const bool goes = page < plan.last && !is_shared(own_bits, page);
      const block_sums<int> before = block_prefix_sum(block, s.sums, goes ? 1 : 0);
      if (goes) to[count + before.own - 1] = ids[page];
      count += before.all;
    }
    return count;
  }

  /// Moves table entries [from, pages) down to [to, ...), one tile of block_threads entries at a
  /// time. Ascending order is safe: no entry overwrites a later one that is still to be moved.
  template <thread_block Block>
  REFREEKV_DEVICE static void shift(Block& block, Index* ids, index_t to, index_t from,
                                    index_t pages) noexcept {
    if (to == from) return;
    for (index_t first = from; first < pages; first += block_threads) {
      const index_t page = first + block.rank();
      const Index id = page < pages ? ids[page] : Index{};
      block.sync();
      if (page < pages) ids[page - (from - to)] = id;
    }
  }
};

template <class Backend, class Index, class Memory>
[[nodiscard]] status release_pages(const Backend& exec,
                                   const view<const page_plan, 1, Memory>& plans,
                                   const shared_pages_view<Memory>& shared,
                                   const page_lists<Index, Memory>& table,
                                   const page_lists<Index, Memory>& freed) noexcept {
  return run_blocks(exec, plans.extent(0),
                    release_pages_body<Index, Memory>{plans, shared, table, freed});
}

}  // namespace refreekv::inline v0::cuda_detail
