// SPDX-License-Identifier: Apache-2.0
// The parameters by which a model turns q.k into a logit.
#pragma once

#include "refreekv/core/view.hpp"

namespace refreekv::inline v0 {

/// The parameters by which a model turns q.k into a logit, in the order in which they apply: scale,
/// soft cap, ALiBi, mask, and a learned sink in the denominator of the softmax.
/// Sliding windows and ALiBi use a token's index in its sequence as its position. They require a
/// cache that has not been pruned before.
template <class Memory = host_memory>
struct attention_params {
  /// Factor of q.k; 0 means 1 / sqrt(head_dim).
  float scale = 0;
  /// A logit x becomes soft_cap * tanh(x / soft_cap); 0 means no cap. (Gemma 2)
  float soft_cap = 0;
  /// In tokens: a query at position p sees positions (p - sliding_window, p]; 0 means all up to p.
  count_t sliding_window = 0;
  /// [q_head]: slope * (token - p) is added to a logit. (ALiBi, arXiv 2108.12409)
  view<const float, 1, Memory> alibi_slopes = {};
  /// [q_head]: exp(sink logit) is added to the normaliser; no token receives that share. (gpt-oss)
  view<const float, 1, Memory> sink_logits = {};
};

}  // namespace refreekv::inline v0
