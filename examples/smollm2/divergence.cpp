// SPDX-License-Identifier: Apache-2.0
#include "divergence.hpp"

#include <algorithm>
#include <cmath>

namespace smollm2 {

namespace {

// log(sum(exp(x))), so that x - this are log probabilities.
double log_sum_exp(std::span<const float> x) {
  const double peak = double{*std::max_element(x.begin(), x.end())};
  double sum = 0;
  for (const float v : x) sum += std::exp(double{v} - peak);
  return peak + std::log(sum);
}

double kl_divergence(std::span<const float> p, std::span<const float> q) {
  const double norm_p = log_sum_exp(p), norm_q = log_sum_exp(q);
  double kl = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double log_p = double{p[i]} - norm_p;
    kl += std::exp(log_p) * (log_p - (double{q[i]} - norm_q));
  }
  return kl;
}

}  // namespace

int top_token(std::span<const float> logits) {
  return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

divergence compare_logits(logits_view full, logits_view pruned) {
  divergence result{};
  for (std::size_t i = 0; i < full.size(); ++i) {
    const double kl = kl_divergence(full[i], pruned[i]);
    result.mean_kl += kl;
    result.largest_kl = std::max(result.largest_kl, kl);
    result.same_top_token += top_token(full[i]) == top_token(pruned[i]) ? 1 : 0;
  }
  result.mean_kl /= static_cast<double>(full.size());
  result.same_top_token /= static_cast<double>(full.size());
  return result;
}

}  // namespace smollm2
