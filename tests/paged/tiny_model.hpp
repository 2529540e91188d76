// SPDX-License-Identifier: Apache-2.0
// The engine with a tiny random model, and prompts for it.
#pragma once

#include <cmath>
#include <random>
#include <span>
#include <vector>

#include "gguf_writer.hpp"
#include "llama.hpp"
#include "small_llama.hpp"

struct tiny_model {
  smollm2_test::small_llama formulas;
  smollm2::llama network = [this] {
    const smollm2_test::temporary_file file(formulas.file().bytes());
    return smollm2::llama(smollm2::gguf_file(file.path()), 1);
  }();
};

inline std::vector<int> random_tokens(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int> tokens(count);
  for (int& token : tokens) {
    token = static_cast<int>(random() % smollm2_test::small_llama::vocabulary);
  }
  return tokens;
}

/// NaN where any of them is.
template <class A, class B>
double largest_difference(const std::vector<A>& a, const std::vector<B>& b) {
  double largest = a.size() == b.size() ? 0 : std::nan("");
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(double{a[i]} - double{b[i]});
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}
