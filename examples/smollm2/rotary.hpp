// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding of adjacent pairs (2i, 2i + 1), the layout of Llama models in GGUF.
#pragma once

#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

namespace smollm2 {

// The rotations of a run of positions, computed once and used by all layers and heads.
class rotary_table {
 public:
  rotary_table(std::size_t first_position, std::size_t positions, std::size_t rope_dims,
               double base)
      : pairs_(rope_dims / 2) {
    angles_.reserve(positions * pairs_);
    for (std::size_t p = first_position; p < first_position + positions; ++p) {
      for (std::size_t i = 0; i < pairs_; ++i) {
        const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(rope_dims);
        const double angle = static_cast<double>(p) * std::pow(base, exponent);
        angles_.push_back(
            {static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))});
      }
    }
  }

  // Rotates the first rope_dims elements of every head, in place. The first token is at the
  // table's position number `first`.
  void rotate(std::size_t first, std::size_t heads, std::size_t head_dim,
              std::span<float> rows) const {  // [token, head, head_dim]
    for (std::size_t row = 0; row < rows.size() / head_dim; ++row) {
      const rotation* angles = angles_.data() + (first + row / heads) * pairs_;
      float* head = rows.data() + row * head_dim;
      for (std::size_t i = 0; i < pairs_; ++i) {
        const float even = head[2 * i];
        const float odd = head[2 * i + 1];
        head[2 * i] = even * angles[i].cosine - odd * angles[i].sine;
        head[2 * i + 1] = even * angles[i].sine + odd * angles[i].cosine;
      }
    }
  }

 private:
  struct rotation {
    float cosine;
    float sine;
  };

  std::size_t pairs_;
  std::vector<rotation> angles_;  // [position, pair]
};

}  // namespace smollm2
