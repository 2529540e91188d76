// SPDX-License-Identifier: Apache-2.0
// What mixed.cpp asks of its two objects.
#pragma once

#include <cstdint>
#include <vector>

struct decisions {
  std::int32_t cut = -1;
  std::vector<std::int32_t> positions;
};

decisions decide_plain(const float* keys, const float* queries, long tokens, long head_dim);
decisions decide_native(const float* keys, const float* queries, long tokens, long head_dim);
