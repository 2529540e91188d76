// SPDX-License-Identifier: Apache-2.0
// Two objects for different instruction sets in one program decide the same.
#include <cstdio>
#include <random>

#include "decide.hpp"

int main() {
  constexpr unsigned seed = 1;
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  int differ = 0;
  for (int i = 0; i < 50; ++i) {
    const auto tokens = static_cast<long>(100 + engine() % 900);
    const auto head_dim = static_cast<long>(8 + engine() % 100);
    std::vector<float> keys(static_cast<std::size_t>(2 * tokens * head_dim));
    std::vector<float> queries(static_cast<std::size_t>(24 * head_dim));
    for (float& x : keys) x = normal(engine);
    for (float& x : queries) x = normal(engine);
    const decisions a = decide_plain(keys.data(), queries.data(), tokens, head_dim);
    const decisions b = decide_native(keys.data(), queries.data(), tokens, head_dim);
    differ += a.cut < 0 || a.cut != b.cut || a.positions != b.positions ? 1 : 0;
  }
  std::printf("seed %u: %d of 50 decisions differ between the two objects\n", seed, differ);
  return differ == 0 ? 0 : 1;
}
