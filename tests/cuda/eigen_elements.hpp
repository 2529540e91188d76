// SPDX-License-Identifier: Apache-2.0
// Eigen's elements, which the tests of every backend use, stand for the device's own.
#pragma once

#include <Eigen/Core>

#include "refreekv/cuda/block/element.hpp"

template <>
struct refreekv::cuda_detail::stored_as<Eigen::half> {
  using type = f16_bits;
};
template <>
struct refreekv::cuda_detail::stored_as<Eigen::bfloat16> {
  using type = bf16_bits;
};
