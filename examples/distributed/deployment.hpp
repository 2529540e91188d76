// SPDX-License-Identifier: Apache-2.0
// How a layer is split over ranks: which heads and which tokens each one has.
#pragma once

#include <algorithm>
#include <refreekv/cache/shard.hpp>
#include <vector>

#include "geometry.hpp"

namespace distributed {

enum class layout {
  heads,   // tensor parallel: KV heads are split
  tokens,  // context parallel: a rank has one run of tokens
  zigzag,  // the same with an early and a late run, so that causal prefill is the same work for all
  grid,    // both: ranks in rows of the same heads and columns of the same tokens
};

// Ranks as a grid: rank r has part r / token_parts of the heads and r % token_parts of the tokens.
struct deployment {
  layout kind;
  index_t head_parts, token_parts;

  index_t ranks() const { return head_parts * token_parts; }

  static deployment of(layout kind, index_t ranks) {
    if (kind == layout::heads) return {kind, ranks, 1};
    if (kind != layout::grid) return {kind, 1, ranks};
    index_t rows = 1;
    for (index_t r = 2; r * r <= ranks; ++r) rows = ranks % r == 0 ? r : rows;
    return {kind, rows, ranks / rows};
  }
};

// Of a layer.
struct rank_part {
  index_t kv_head, kv_heads;  // [kv_head, kv_head + kv_heads)
  index_t q_head, q_heads;
  std::vector<refreekv::token_range> tokens;  // in their order

  index_t token_count() const {
    index_t count = 0;
    for (const auto& [begin, end] : tokens) count += end - begin;
    return count;
  }
};

// Heads are split in parts that differ by one at most. More ranks than KV heads have copies of
// them, as engines do it, and split a copy's query heads. Requires head_parts <= q_heads.
inline rank_part part_of(const deployment& ranks, index_t rank, const geometry& shape,
                         index_t tokens, index_t sinks) {
  const auto begin_of = [](index_t count, index_t i, index_t parts) {
    return (count * i + parts - 1) / parts;
  };
  const index_t row = rank / ranks.token_parts, rows = ranks.head_parts;
  rank_part part{};
  if (rows <= shape.kv_heads) {
    part.kv_head = begin_of(shape.kv_heads, row, rows);
    part.kv_heads = begin_of(shape.kv_heads, row + 1, rows) - part.kv_head;
    part.q_head = part.kv_head * shape.group();
    part.q_heads = part.kv_heads * shape.group();
  } else {
    part.kv_head = row * shape.kv_heads / rows;
    part.kv_heads = 1;
    const index_t first = begin_of(rows, part.kv_head, shape.kv_heads);
    const index_t copies = begin_of(rows, part.kv_head + 1, shape.kv_heads) - first;
    const index_t begin = begin_of(shape.group(), row - first, copies);
    part.q_head = part.kv_head * shape.group() + begin;
    part.q_heads = begin_of(shape.group(), row - first + 1, copies) - begin;
  }
  const index_t column = rank % ranks.token_parts, columns = ranks.token_parts;
  const refreekv::chunking chunks{tokens, sinks};
  if (ranks.kind == layout::zigzag) {
    part.tokens = {refreekv::even_part(chunks, column, 2 * columns),
                   refreekv::even_part(chunks, 2 * columns - 1 - column, 2 * columns)};
  } else {
    part.tokens = {refreekv::even_part(chunks, column, columns)};
  }
  return part;
}

}  // namespace distributed
