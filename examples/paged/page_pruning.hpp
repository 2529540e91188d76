// SPDX-License-Identifier: Apache-2.0
// Where the block manager meets refreekv: a layer's decision, and the pages that it returns.
#pragma once

#include <span>
#include <variant>
#include <vector>

#include "llama.hpp"
#include "paged_cache.hpp"

namespace paged {

// The policies that can leave all KV heads of a layer one length and a shared prefix where it is.
using page_policy = std::variant<refreekv::policy::refreekv, refreekv::policy::faithful>;

struct page_release {
  std::size_t tokens;        // of the prompt
  std::size_t kept;          // slots of each KV head that attention sees
  std::size_t stand_ins;     // of these, in place of tokens that went
  std::size_t pages_before;  // of the layer's table
  std::size_t pages_after;
  std::size_t promised;            // pages, by what is kept
  std::vector<block_id> returned;  // pages that nobody owns any more
};

// What is kept of all layers' tokens, or how much of that stands in for others: in [0, 1].
double share_of(std::size_t page_release::*count, const std::vector<page_release>& releases);

// A layer whose cache holds the whole prompt gives up whole pages, and keeps the room for tokens to
// come that it had. Pages that others own, too, are neither written nor freed.
// queries: [row, q_head, head_dim], of the last tokens; where there are fewer than the policy's
// window, behind a shared prefix say, it looks at these. Throws std::runtime_error where refreekv
// refuses.
page_release prune(const page_policy& policy, std::size_t layer, std::span<const float> queries,
                   std::size_t q_heads, paged_layer& cache);

// A prefill that prunes each layer as soon as it can, and adds what that released.
smollm2::prefill_hooks_for<paged_cache> pruning_hooks(const page_policy& policy,
                                                      std::size_t q_heads,
                                                      std::vector<page_release>& releases);

// The two steps of a policy that keeps a range. All heads are on the same pages, so they share it.
refreekv::kept_range decide(const refreekv::policy::refreekv& policy, std::size_t layer,
                            std::span<const float> queries, std::size_t q_heads,
                            const paged_layer& cache);
page_release release(const refreekv::kept_range& kept, paged_layer& cache);

}  // namespace paged
