// SPDX-License-Identifier: Apache-2.0
// Lets Eigen's half and bfloat16, which all tests use, replace the device's own element types.
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
