// SPDX-License-Identifier: Apache-2.0
// Compares decisions of policy::refreekv with the double-precision oracle.
#pragma once

#include "reference.hpp"
#include "selection.hpp"

/// Checks a decision on a problem's layer, and that it is the same on seven parts. The problem's
/// keys are the numbers that the layer's keys mean.
template <class Layer>
void check_by_oracle(const problem& p, const refreekv::policy::refreekv& policy,
                     const Layer& layer) {
  const selection one = run_select(policy, divided<1>(), layer);
  REQUIRE(one.status == refreekv::status::ok);
  const selection seven = run_select(policy, divided<7>(), layer);
  const index_t heads_of_cut = p.q_heads() / std::max<index_t>(one.groups, 1);
  for (index_t s = 0; s < p.sequences(); ++s) {
    const auto rows = reference::attend(p, s);
    for (index_t g = 0; g < one.groups; ++g) {
      const auto expected =
          reference::decide(rows, g * heads_of_cut, (g + 1) * heads_of_cut, policy);
      INFO("sequence " << s << " group " << g << " tokens " << rows.tokens);
      CHECK(reference::disagreement(one.at(s, g), expected, policy.threshold) == "");
      CHECK(seven.at(s, g) == one.at(s, g));
    }
  }
}
