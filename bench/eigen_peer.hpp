// SPDX-License-Identifier: Apache-2.0
// The same decision as one would write it with Eigen alone: a matrix of floats and whole rows of
// attention, in memory that Eigen allocates.
#pragma once

#include <algorithm>
#include <cmath>

#include "layer.hpp"

namespace bench {

/// The cut of a layer for a loss of 1 % with 4 sinks.
template <class T>
index_t eigen_cut(const synthetic_layer<T>& layer) {
  using Eigen::Dynamic, Eigen::Map, Eigen::RowMajor;
  using elements = Eigen::Matrix<T, Dynamic, Dynamic, RowMajor>;
  const index_t q_heads = layer.shape().q_heads, kv_heads = layer.shape().kv_heads;
  const index_t head_dim = layer.shape().head_dim;
  const index_t tokens = layer.tokens(), group = q_heads / kv_heads, sinks = 4;
  Eigen::ArrayXd norms = Eigen::ArrayXd::Zero(tokens);
  for (index_t h = 0; h < kv_heads; ++h) {
    const Map<const elements> keys(layer.key_data() + h * tokens * head_dim, tokens, head_dim);
    const Map<const elements> queries(layer.query() + h * group * head_dim, group, head_dim);
    const Eigen::MatrixXf logits = keys.template cast<float>() *
                                   queries.template cast<float>().transpose() /
                                   std::sqrt(static_cast<float>(head_dim));
    for (index_t q = 0; q < group; ++q) {
      const Eigen::ArrayXf row = (logits.col(q).array() - logits.col(q).maxCoeff()).exp();
      const double sum = row.cast<double>().sum();
      double energy = 0;
      for (index_t t = tokens - 1; t >= sinks; --t) {
        const double attention = double{row(t)} / sum;
        energy += attention * attention;
        norms(t) += std::sqrt(energy);
      }
    }
  }
  index_t cut = tokens - 1;
  while (cut > sinks && !(1 - norms(cut) / norms(sinks) <= 0.01)) --cut;
  return cut;
}

}  // namespace bench
