// SPDX-License-Identifier: Apache-2.0
#include "results.hpp"

#include <algorithm>

namespace evaluate {

std::string result_row::label() const {
  return options + (options.empty() || budget.empty() ? "" : ", ") + budget;
}

measurement results::mean(const result_row& row) const {
  measurement mean{};
  double weights = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const measurement& each = row.of_prompts[i];
    const auto weight = static_cast<double>(prompts[i].compared_tokens);
    weights += weight;
    mean.kept_fraction += weight * each.kept_fraction;
    mean.against_full.mean_kl += weight * each.against_full.mean_kl;
    mean.against_full.largest_kl =
        std::max(mean.against_full.largest_kl, each.against_full.largest_kl);
    mean.against_full.same_top_token += weight * each.against_full.same_top_token;
    mean.keys += each.keys;
    mean.select_seconds += weight * each.select_seconds;
    mean.cache_bytes += weight * each.cache_bytes;
  }
  for (double* sum : {&mean.kept_fraction, &mean.against_full.mean_kl,
                      &mean.against_full.same_top_token, &mean.select_seconds, &mean.cache_bytes}) {
    *sum /= weights;
  }
  return mean;
}

double results::median_kl(const result_row& row) const {
  std::vector<double> of_prompts;
  for (const measurement& each : row.of_prompts) of_prompts.push_back(each.against_full.mean_kl);
  std::sort(of_prompts.begin(), of_prompts.end());
  const std::size_t count = of_prompts.size();
  return (of_prompts[(count - 1) / 2] + of_prompts[count / 2]) / 2;
}

std::size_t results::farther(const result_row& row) const {
  const result_row& reference = rows[*row.reference];
  std::size_t count = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const double kl = row.of_prompts[i].against_full.mean_kl;
    if (kl > reference.of_prompts[i].against_full.mean_kl) ++count;
  }
  return count;
}

}  // namespace evaluate
