// SPDX-License-Identifier: Apache-2.0
// What became of one layer's cache.
#pragma once

#include <cstddef>
#include <refreekv/refreekv.hpp>
#include <vector>

namespace smollm2 {

struct layer_pruning {
  // What stays is a range, [group]: 1, or one for each KV head; or tokens anywhere, [kv_head].
  // Both are empty where nothing was decided.
  std::vector<refreekv::kept_range> kept;
  std::vector<refreekv::kept_tokens> counts;
  std::vector<refreekv::position_t> stand_ins;  // [kv_head], or empty: rows in place of what went
  std::size_t tokens;
  std::size_t bytes_before;  // as allocated
  std::size_t bytes_after;
  double seconds;          // decision, compaction and giving memory back
  double library_seconds;  // decision and compaction

  double kept_fraction() const;
};

}  // namespace smollm2
