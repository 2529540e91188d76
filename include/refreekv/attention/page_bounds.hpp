// SPDX-License-Identifier: Apache-2.0
// The smallest and the largest key of each page, from which Twilight's selector Quest (arXiv
// 2406.10774) selects pages.
#pragma once

#include "refreekv/attention/layer.hpp"

namespace refreekv::inline v0 {

/// The smallest and the largest element of each page's keys, for each dimension. From them Quest
/// (arXiv 2406.10774) finds the pages that a query may attend to. After a compaction they must be
/// rebuilt from token 0.
template <class Memory = host_memory>
struct page_bounds {
  view<float, 5, Memory> bounds;  ///< [sequence, kv_head, page, 2, head_dim]: smallest, largest
  index_t page_tokens = 16;
};

/// A layer of queries with the bounds of its keys' pages.
template <model_layer Layer>
  requires requires(const Layer& layer) { layer.queries; }
struct bounded_layer : Layer {
  using plain_type = Layer;

  page_bounds<typename Layer::memory> pages;

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (const char* why = Layer::invalid()) return why;
    const auto& b = pages.bounds;
    if (pages.page_tokens < 1 || pages.page_tokens > max_count) return "page_tokens must be >= 1";
    if (b.malformed() || b.extent(0) != this->sequences() || b.extent(1) != this->kv_heads() ||
        b.extent(2) < (this->capacity() + pages.page_tokens - 1) / pages.page_tokens ||
        b.extent(3) != 2 || b.extent(4) != this->head_dim()) {
      return "page bounds must be [sequence, kv_head, page, 2, head_dim]";
    }
    return nullptr;
  }
};

/// Returns the layer with the bounds of its keys' pages. O(1).
template <model_layer Layer>
[[nodiscard]] constexpr auto with_pages(const Layer& layer,
                                        const page_bounds<typename Layer::memory>& pages) noexcept {
  return bounded_layer<Layer>{{layer}, pages};
}

}  // namespace refreekv::inline v0
