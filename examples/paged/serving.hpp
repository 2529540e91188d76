// SPDX-License-Identifier: Apache-2.0
// Three sequences in one pool: A and B share a prefix, A is pruned, C lives in what A returned.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "llama.hpp"
#include "page_pruning.hpp"

namespace paged {

using progress = std::function<void(const std::string& phase, double fraction)>;

struct serving_plan {
  std::vector<int> a, b, c;  // prompts
  std::size_t steps;         // tokens that A and B decode; C comes in after half of them
  std::size_t page_tokens;
  page_policy policy;
};

struct served {
  std::size_t prompt_tokens;
  std::size_t pages;        // at the end, of all layers
  std::vector<int> tokens;  // decoded
  // The largest difference between its logits and those of the same tokens in a pool of its own.
  double difference;
};

struct serving_result {
  page_shape page;
  std::size_t pool_pages;
  std::size_t shared_tokens;
  std::size_t shared_pages;            // of all layers
  std::size_t free_before;             // pages, once A and B are admitted
  std::size_t needed_by_c;             // pages
  std::vector<page_release> releases;  // [layer] of A
  std::size_t free_after;              // once A is pruned
  std::size_t returned_to_c;           // pages of C that A had returned
  std::size_t free_at_end;
  bool shared_pages_unchanged;
  served a, b, c;

  std::size_t promised() const;  // bytes, by the decisions on A's layers
  std::size_t returned() const;  // bytes, on the lists of freed pages

  // Null, or which of the things that must hold does not.
  const char* wrong() const;
};

// The pool is as large as A and B need, so C does not fit before A has returned pages. Throws
// std::runtime_error where it does not fit into those either, or nothing can be shared.
serving_result serve(const smollm2::llama& model, const serving_plan& plan,
                     const progress& on_progress);

}  // namespace paged
