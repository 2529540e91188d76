// SPDX-License-Identifier: Apache-2.0
#include "layer_pruning.hpp"

#include <numeric>

namespace smollm2 {

namespace {

template <class Kept>
double mean_kept_fraction(const std::vector<Kept>& kept) {
  double sum = 0;
  for (const Kept& each : kept) sum += each.kept_fraction();
  return sum / static_cast<double>(kept.size());
}

}  // namespace

double layer_pruning::kept_fraction() const {
  if (!kept.empty()) return mean_kept_fraction(kept);
  if (counts.empty()) return 1;
  const double rows = std::accumulate(stand_ins.begin(), stand_ins.end(), 0.0);
  const auto slots = static_cast<double>(tokens * counts.size());
  return mean_kept_fraction(counts) + (slots > 0 ? rows / slots : 0);
}

}  // namespace smollm2
