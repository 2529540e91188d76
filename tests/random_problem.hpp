// SPDX-License-Identifier: Apache-2.0
// Random policies and problems with every option.
#pragma once

#include "layouts.hpp"

/// A random policy::refreekv with every option, for layers of `window` rows.
inline refreekv::policy::refreekv random_rule(random_source& random, index_t window) {
  refreekv::policy::refreekv policy;
  policy.threshold = random.one_of({0.0, 0.001, 0.01, 0.05, 0.3, 0.9, 1.0});
  policy.sinks = random.one_of<count_t>({0, 1, 4, 4, 7, 255, 256, 257, 300});
  policy.window = static_cast<count_t>(random.between(1, window));
  policy.average = random.one_of({refreekv::row_average::mean, refreekv::row_average::frobenius});
  policy.norm = random.one_of({refreekv::norm_scope::candidates, refreekv::norm_scope::full_row});
  policy.scope = random.one_of({refreekv::cut_scope::layer, refreekv::cut_scope::kv_head});
  policy.full_layers = static_cast<count_t>(random.between(0, 9));
  return policy;
}

/// Tokens of a sequence; often a length at which chunks after 4 sinks end.
inline position_t random_length(random_source& random) {
  return static_cast<position_t>(random.chance(0.3) ? random.between(0, 12)
                                 : random.chance(0.7)
                                     ? random.one_of<index_t>({255, 256, 257, 260, 261, 516, 517})
                                     : random.between(5, 700));
}

/// A problem of random shape with random parameters of attention. Lengths are multiplied by
/// `stretch`; head_dim is one of `dims`.
inline problem random_problem(random_source& random, position_t stretch = 1,
                              std::initializer_list<index_t> dims = {1, 8, 16, 20, 64, 80}) {
  std::vector<position_t> lengths(size(random.between(0, 3)));
  for (position_t& n : lengths) n = stretch * random_length(random);
  const index_t window = random.chance(0.4) ? 1 : random.one_of<index_t>({2, 3, 8, 17, 64});
  problem p(random.one_of<index_t>({1, 2, 3}), random.one_of<index_t>({1, 2, 3, 4, 7}),
            random.one_of(dims), window, lengths);
  fill(p, random);
  const auto some = [&](std::vector<float>& per_head, float low, float high) {
    for (index_t h = 0; h < p.q_heads(); ++h) {
      per_head.push_back(low + (high - low) * static_cast<float>(random.between(0, 100)) / 100);
    }
  };
  if (random.chance(0.3)) p.scale = random.one_of({0.05f, 0.25f, 1.0f});
  if (random.chance(0.3)) p.soft_cap = random.one_of({2.0f, 30.0f, 50.0f});
  if (random.chance(0.3)) p.sliding_window = random.one_of<count_t>({1, 5, 100, 300, 5000});
  if (random.chance(0.3)) some(p.alibi_slopes, 0, 0.5f);
  if (random.chance(0.3)) some(p.sink_logits, -5, 12);
  add_rows(p, random);
  return p;
}
