// SPDX-License-Identifier: Apache-2.0
#include "layer_pruning.hpp"

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
  return counts.empty() ? 1 : mean_kept_fraction(counts);
}

}  // namespace smollm2
