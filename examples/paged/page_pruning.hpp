// SPDX-License-Identifier: Apache-2.0
// Where the block manager meets refreekv: a layer's decision, and the pages that it returns.
#pragma once

#include <span>
#include <vector>

#include "paged_cache.hpp"

namespace paged {

struct page_release {
  refreekv::kept_range kept;
  std::size_t pages_before;  // of the layer's table
  std::size_t pages_after;
  std::size_t promised;            // pages, by the plan
  std::vector<block_id> returned;  // pages that nobody owns any more
};

// What stays of a layer whose cache holds the whole prompt. All heads are on the same pages, so
// they share a range. queries: [row, q_head, head_dim], of the last tokens; where there are fewer
// than the rule's window, behind a shared prefix say, it looks at these. Throws std::runtime_error
// where refreekv refuses.
refreekv::kept_range decide(const refreekv::policy::refreekv& rule, std::size_t layer,
                            std::span<const float> queries, std::size_t q_heads,
                            const paged_layer& cache);

// Takes whole pages out of the layer's table. Pages that others own, too, are neither written nor
// freed.
page_release release(const refreekv::kept_range& kept, paged_layer& cache);

}  // namespace paged
