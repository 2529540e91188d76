// SPDX-License-Identifier: Apache-2.0
// Decisions as the tensors that an operator returns.
#pragma once

#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <refreekv/decision/stand_ins.hpp>
#include <refreekv/policy/policy.hpp>
#include <vector>

#include "tensors.hpp"

namespace refreekv_torch {

/// Memory for a decision of the library, and the tensors that it becomes. Its members:
/// - `schema`: the type of the tensors, as a schema has it.
/// - `result(policy, layer, options)`: allocates both. Reads no data, so it also serves Meta.
/// - `kept()`: the memory that `select` writes.
/// - `finish()`: writes to the tensors what `select` wrote.
/// - `push(stack)`: pushes the tensors.
template <class Decision>
class result;

inline at::TensorOptions of_type(const at::TensorOptions& options, at::ScalarType type) {
  return options.dtype(type).requires_grad(false);
}

template <>
class result<kv::kept_ranges<>> {
 public:
  static constexpr const char* schema = "Tensor";

  template <class Policy, class Layer>
  result(const Policy& policy, const Layer& layer, const at::TensorOptions& options)
      : numbers_(at::empty({layer.sequences(), kv::groups_of(policy, layer), 3},
                           of_type(options, at::kInt))),
        ranges_(static_cast<std::size_t>(numbers_.numel() / 3)) {}

  [[nodiscard]] kv::kept_ranges<> kept() {
    return {ranges_.data(), {numbers_.size(0), numbers_.size(1)}};
  }
  void finish() const {
    int* out = numbers_.data_ptr<int>();
    for (const kv::kept_range& each : ranges_) {
      *out++ = each.sinks;
      *out++ = each.cut;
      *out++ = each.tokens;
    }
  }
  void push(std::vector<c10::IValue>& stack) const { stack.emplace_back(numbers_); }

 private:
  at::Tensor numbers_;
  std::vector<kv::kept_range> ranges_;
};

template <>
class result<kv::kept_positions<>> {
 public:
  static constexpr const char* schema = "(Tensor positions, Tensor counts)";

  template <class Policy, class Layer>
  result(const Policy&, const Layer& layer, const at::TensorOptions& options)
      : positions_(at::empty({layer.sequences(), layer.kv_heads(), layer.capacity()},
                             of_type(options, at::kInt))),
        numbers_(at::empty({layer.sequences(), layer.kv_heads()}, of_type(options, at::kInt))),
        counts_(static_cast<std::size_t>(numbers_.numel())) {}

  [[nodiscard]] kv::kept_positions<> kept() {
    return {view_of<kv::position_t, 3>(positions_),
            {counts_.data(), {numbers_.size(0), numbers_.size(1)}}};
  }
  /// The entries after a head's count become -1: an index that is refused, not one that is wrong.
  void finish() const {
    int* row = positions_.data_ptr<int>();
    int* number = numbers_.data_ptr<int>();
    for (const kv::kept_tokens& each : counts_) {
      *number++ = each.count;
      std::fill(row + each.count, row + positions_.size(2), -1);
      row += positions_.size(2);
    }
  }
  void push(std::vector<c10::IValue>& stack) const {
    stack.emplace_back(positions_);
    stack.emplace_back(numbers_);
  }

 private:
  at::Tensor positions_;
  at::Tensor numbers_;
  std::vector<kv::kept_tokens> counts_;
};

template <>
class result<kv::kept_with_stand_ins<>> {
 public:
  static constexpr const char* schema =
      "(Tensor positions, Tensor counts, Tensor stand_in_keys, Tensor stand_in_values, "
      "Tensor stand_in_counts)";

  template <class Policy, class Layer>
  result(const Policy& policy, const Layer& layer, const at::TensorOptions& options)
      : positions_(policy, layer, options) {
    const int64_t batch = layer.sequences(), heads = layer.kv_heads();
    const int64_t most = policy.most_stand_ins(layer.capacity());
    const at::TensorOptions floats = of_type(options, at::kFloat);
    keys_ = at::zeros({batch, heads, most, layer.head_dim()}, floats);
    values_ = at::zeros({batch, heads, most, layer.values.shape().head_dim}, floats);
    numbers_ = at::zeros({batch, heads}, of_type(options, at::kInt));
  }

  [[nodiscard]] kv::kept_with_stand_ins<> kept() {
    return {positions_.kept(),
            {view_of<float, 4>(keys_), view_of<float, 4>(values_),
             view_of<kv::position_t, 2>(numbers_)}};
  }
  void finish() const { positions_.finish(); }
  void push(std::vector<c10::IValue>& stack) const {
    positions_.push(stack);
    for (const at::Tensor& each : {keys_, values_, numbers_}) stack.emplace_back(each);
  }

 private:
  result<kv::kept_positions<>> positions_;
  at::Tensor keys_, values_, numbers_;
};

}  // namespace refreekv_torch
