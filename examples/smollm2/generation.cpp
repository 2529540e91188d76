// SPDX-License-Identifier: Apache-2.0
#include "generation.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace smollm2 {

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int top_token(const std::vector<float>& logits) {
  return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// log(sum(exp(x))), so that x - this are log probabilities.
double log_sum_exp(const std::vector<float>& x) {
  const double peak = double{*std::max_element(x.begin(), x.end())};
  double sum = 0;
  for (const float v : x) sum += std::exp(double{v} - peak);
  return peak + std::log(sum);
}

double kl_divergence(const std::vector<float>& p, const std::vector<float>& q) {
  const double norm_p = log_sum_exp(p), norm_q = log_sum_exp(q);
  double kl = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double log_p = double{p[i]} - norm_p;
    kl += std::exp(log_p) * (log_p - (double{q[i]} - norm_q));
  }
  return kl;
}

}  // namespace

generation generate(const llama& model, std::vector<float> logits, kv_cache& cache,
                    std::size_t count, int end_token) {
  const auto start = std::chrono::steady_clock::now();
  generation result{};
  while (result.tokens.size() < count) {
    const int token = top_token(logits);
    if (token == end_token) break;
    result.tokens.push_back(token);
    result.logits.push_back(std::move(logits));
    if (result.tokens.size() == count || cache.next_position() == model.config().context) break;
    logits = model.decode(token, cache);
  }
  result.seconds = seconds_since(start);
  return result;
}

comparison compare(const llama& model, const generation& full, kv_cache& pruned) {
  comparison result{0, 0, static_cast<double>(full.tokens.size() - 1) / full.seconds};
  std::vector<float> logits = full.logits.front();
  for (std::size_t i = 0; i < full.tokens.size(); ++i) {
    result.mean_kl += kl_divergence(full.logits[i], logits);
    result.same_top_token += top_token(logits) == full.tokens[i] ? 1 : 0;
    if (i + 1 < full.tokens.size()) logits = model.decode(full.tokens[i], pruned);
  }
  result.mean_kl /= static_cast<double>(full.tokens.size());
  result.same_top_token /= static_cast<double>(full.tokens.size());
  return result;
}

}  // namespace smollm2
