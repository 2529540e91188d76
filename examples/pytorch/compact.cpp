// SPDX-License-Identifier: Apache-2.0
// torch.ops.refreekv.compact_: makes what a decision keeps contiguous, in place. Memory comes back
// with a copy of the slots that stay, not before.
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include <refreekv/compact.hpp>
#include <refreekv/cpu/backend.hpp>
#include <vector>

#include "tensors.hpp"

namespace refreekv_torch {

namespace {

/// Positions of the tensors that `select` returned.
class positions {
 public:
  positions(const at::Tensor& rows, const at::Tensor& counts) {
    require_shape(rows, "positions", 3, "[batch, kv_head, token]", at::kInt);
    require_shape(counts, "counts", 2, "[batch, kv_head]", at::kInt);
    rows_ = rows.contiguous();
    const at::Tensor numbers = counts.contiguous();
    const int* number = numbers.data_ptr<int>();
    for (int64_t i = 0; i < numbers.numel(); ++i) {
      counts_.push_back({.count = number[i], .tokens = static_cast<kv::position_t>(rows.size(2))});
    }
    shape_[0] = counts.size(0);
    shape_[1] = counts.size(1);
  }

  [[nodiscard]] kv::kept_positions<> kept() {
    return {view_of<kv::position_t, 3>(rows_), {counts_.data(), {shape_[0], shape_[1]}}};
  }

 private:
  at::Tensor rows_;
  std::vector<kv::kept_tokens> counts_;
  int64_t shape_[2];
};

void require_cache(const at::Tensor& cache) {
  require_shape(cache, "a cache", 4, "[batch, kv_head, token, head_dim]");
  at::assert_no_internal_overlap(cache);
}

/// Compacts each cache by itself, so that they may differ in type. Checks all of them before.
template <class Kept>
void compact_each(const Kept& kept, kv::compaction mode, at::TensorList caches) {
  for (std::size_t i = 0; i < caches.size(); ++i) {
    const at::Tensor& cache = caches[i];
    require_cache(cache);
    for (std::size_t k = 0; k < i; ++k) at::assert_no_overlap(caches[k], cache);
    with_caches([&](const auto& rows) { require_valid(kv::why_invalid(kept, mode, rows)); }, cache);
  }
  const kv::cpu_backend exec{torch_threads{}};
  for (const at::Tensor& cache : caches) {
    with_caches(
        [&](const auto& rows) { require_ok(kv::compact(exec, kept, mode, rows), "compact_"); },
        cache);
  }
}

void compact_ranges(at::TensorList caches, const at::Tensor& kept) {
  TORCH_CHECK(kept.dim() == 3 && kept.size(2) == 3 && kept.scalar_type() == at::kInt,
              "refreekv: kept must be int32 [batch, group, 3], as select returns it");
  const at::Tensor numbers = kept.contiguous();
  std::vector<kv::kept_range> ranges;
  for (const int* next = numbers.data_ptr<int>(); next != numbers.data_ptr<int>() + kept.numel();
       next += 3) {
    ranges.push_back({.sinks = next[0], .cut = next[1], .tokens = next[2]});
  }
  const kv::view<const kv::kept_range, 2> view(ranges.data(), {kept.size(0), kept.size(1)});
  compact_each(view, kv::compaction::sinks_up, caches);
}

void compact_positions(at::TensorList caches, const at::Tensor& rows, const at::Tensor& counts) {
  positions kept(rows, counts);
  compact_each(kept.kept(), kv::compaction::suffix_down, caches);
}

void compact_stand_ins(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& rows,
                       const at::Tensor& counts, const at::Tensor& stand_in_keys,
                       const at::Tensor& stand_in_values, const at::Tensor& stand_in_counts) {
  constexpr const char* shape = "[batch, kv_head, stand_in, head_dim]";
  constexpr auto mode = kv::compaction::suffix_down;
  require_cache(keys);
  require_cache(values);
  require_shape(stand_in_keys, "stand_in_keys", 4, shape, at::kFloat);
  require_shape(stand_in_values, "stand_in_values", 4, shape, at::kFloat);
  require_shape(stand_in_counts, "stand_in_counts", 2, "[batch, kv_head]", at::kInt);
  positions tokens(rows, counts);
  const at::Tensor key_rows = stand_in_keys.contiguous();
  const at::Tensor value_rows = stand_in_values.contiguous();
  const kv::kept_with_stand_ins<> kept(tokens.kept(),
                                       {view_of<float, 4>(key_rows), view_of<float, 4>(value_rows),
                                        view_of<kv::position_t, 2>(stand_in_counts)});
  with_caches(
      [&](const auto& key_cache, const auto& value_cache) {
        require_valid(kv::why_invalid(kept, mode, key_cache, value_cache));
        require_ok(
            kv::compact(kv::cpu_backend{torch_threads{}}, kept, mode, key_cache, value_cache),
            "compact_");
      },
      keys, values);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(refreekv, m) {
  // Ranges: moves the sinks up to the cut. What stays is narrow(2, cut - sinks, sinks + tokens -
  // cut), a view.
  m.def("compact_(Tensor(a!)[] caches, Tensor kept) -> ()");
  // Positions: moves the kept tokens down. What stays of a head is narrow(0, 0, count).
  m.def("compact_.positions(Tensor(a!)[] caches, Tensor positions, Tensor counts) -> ()");
  // The same, and writes the stand-ins behind the kept tokens.
  m.def(
      "compact_.stand_ins(Tensor(a!) keys, Tensor(b!) values, Tensor positions, Tensor counts, "
      "Tensor stand_in_keys, Tensor stand_in_values, Tensor stand_in_counts) -> ()");
}

TORCH_LIBRARY_IMPL(refreekv, CPU, m) {
  m.impl("compact_", compact_ranges);
  m.impl("compact_.positions", compact_positions);
  m.impl("compact_.stand_ins", compact_stand_ins);
}

TORCH_LIBRARY_IMPL(refreekv, Meta, m) {
  m.impl("compact_", [](at::TensorList, const at::Tensor&) {});
  m.impl("compact_.positions", [](at::TensorList, const at::Tensor&, const at::Tensor&) {});
  m.impl("compact_.stand_ins",
         [](const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
            const at::Tensor&, const at::Tensor&, const at::Tensor&) {});
}

}  // namespace refreekv_torch
