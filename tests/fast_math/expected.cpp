// SPDX-License-Identifier: Apache-2.0
#include "expected.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

namespace {

std::size_t size(long n) { return static_cast<std::size_t>(n); }

/// Attention of a row of a query head: [token], 0 behind the row's own.
std::vector<double> attention(const layer& of, long row, long q_head) {
  const long visible = of.tokens - of.rows + row + 1, dims = of.head_dim;
  const float* q = &of.queries[size((row * of.q_heads + q_head) * dims)];
  const float* k = &of.keys[size(q_head / (of.q_heads / of.kv_heads) * of.tokens * dims)];
  std::vector<double> a(size(of.tokens), 0.0);
  for (long t = 0; t < visible; ++t) {
    double& x = a[size(t)];
    for (long d = 0; d < dims; ++d) x += double{q[d]} * double{k[t * dims + d]};
    if (of.soft_cap > 0) x = of.soft_cap * std::tanh(x / of.soft_cap);
  }
  const double peak = *std::max_element(a.begin(), a.begin() + visible);
  double sum = 0;
  for (long t = 0; t < visible; ++t) sum += a[size(t)] = std::exp(a[size(t)] - peak);
  for (double& x : a) x /= sum;
  return a;
}

}  // namespace

bool right_cut(const layer& of, bool frobenius, double threshold, long cut, double loss) {
  const long sinks = 4;
  std::vector<double> norms(size(of.tokens), 0.0);
  for (long h = 0; h < of.q_heads; ++h) {
    std::vector<double> sums(size(of.tokens), 0.0), squares = sums;
    for (long r = 0; r < of.rows; ++r) {
      const std::vector<double> a = attention(of, r, h);
      for (std::size_t t = 0; t < a.size(); ++t) {
        sums[t] += a[t];
        squares[t] += a[t] * a[t];
      }
    }
    double energy = 0;
    for (long t = of.tokens - 1; t >= sinks; --t) {
      const auto rows = static_cast<double>(std::min(of.rows, of.tokens - t));  // that see it
      energy += frobenius ? squares[size(t)] : sums[size(t)] * sums[size(t)] / rows / rows;
      norms[size(t)] += std::sqrt(energy);
    }
  }
  const auto loss_at = [&](long t) { return 1 - norms[size(t)] / norms[size(sinks)]; };
  if (cut < sinks || cut >= of.tokens || !(std::abs(loss - loss_at(cut)) < 1e-5)) return false;
  return loss_at(cut) <= threshold + 2e-6 &&
         (cut + 1 == of.tokens || loss_at(cut + 1) > threshold - 2e-6);
}

bool right_tokens(const layer& of, long kv_head, long budget, const std::vector<long>& kept) {
  const long scored = of.tokens - of.rows, group = of.q_heads / of.kv_heads;
  if (static_cast<long>(kept.size()) != budget) return false;
  std::vector<double> votes(size(scored), 0.0), pooled = votes;
  for (long h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    for (long r = 0; r < of.rows; ++r) {
      const std::vector<double> a = attention(of, r, h);
      std::transform(votes.begin(), votes.end(), a.begin(), votes.begin(), std::plus<>());
    }
  }
  for (long t = 0; t < scored; ++t) {
    const auto first = votes.begin() + std::max(0L, t - 2);
    pooled[size(t)] = std::accumulate(first, votes.begin() + std::min(scored, t + 3), 0.0);
  }
  std::vector<double> best = pooled;
  std::sort(best.begin(), best.end(), std::greater<>());
  const double least = best[size(budget - of.rows - 1)];
  return std::all_of(kept.begin(), kept.end(), [&](long t) {
    return t >= scored || pooled[size(t)] >= least * (1 - 2e-5) - 1e-15;
  });
}

bool right_exponential(float x, float exponent, float value) {
  const double exact = std::exp(double{x} - double{exponent} * 0.69314718055994530942);
  return std::abs(double{value} - exact) <= 2e-7 * exact;
}
