// SPDX-License-Identifier: Apache-2.0
// What must be decided. Its functions are compiled without the flags under test.
#pragma once

#include <vector>

/// One layer of one sequence. All rows see what comes before their own token; no key is NaN.
struct layer {
  long tokens, rows, q_heads, kv_heads, head_dim;
  double soft_cap;             ///< 0 for none
  std::vector<float> queries;  ///< [row, q_head, head_dim]
  std::vector<float> keys;     ///< [kv_head, token, head_dim]
};

/// Whether the norm scan (scale 1, 4 sinks, candidates' norm) cuts at `cut` and loses `loss`. A cut
/// is as good as another where their losses lie within 2e-6 of the threshold.
bool right_cut(const layer& of, bool frobenius, double threshold, long cut, double loss);

/// Whether SnapKV (a window of all rows, an average over 5) keeps `kept` of a KV head. Scores
/// within 2e-5 are as good as another.
bool right_tokens(const layer& of, long kv_head, long budget, const std::vector<long>& kept);

/// Whether `value` is exp(x) / 2^exponent, to about three units in the last place.
bool right_exponential(float x, float exponent, float value);
