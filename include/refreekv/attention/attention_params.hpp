// SPDX-License-Identifier: Apache-2.0
// How a model turns q.k into a logit.
#pragma once

#include "refreekv/core/view.hpp"

namespace refreekv::inline v0 {

/// How a model turns q.k into a logit. In the order applied:
/// scale, soft cap, ALiBi, mask, and a learned sink in the denominator of the softmax.
/// Sliding windows and ALiBi take a token's number in its sequence for its position: the cache must
/// not have been pruned before.
template <class Memory = host_memory>
struct attention_params {
  /// Multiplies q.k; 0 stands for 1 / sqrt(head_dim).
  float scale = 0;
  /// x becomes soft_cap * tanh(x / soft_cap); 0 for none. (Gemma 2)
  float soft_cap = 0;
  /// A query at position p sees positions (p - sliding_window, p]; 0 for all up to p.
  count_t sliding_window = 0;
  /// [q_head]: slope * (token - p) is added. (ALiBi, arXiv 2108.12409)
  view<const float, 1, Memory> alibi_slopes = {};
  /// [q_head]: exp(logit) joins the normaliser, no token gets that share. (gpt-oss)
  view<const float, 1, Memory> sink_logits = {};
};

}  // namespace refreekv::inline v0
