// SPDX-License-Identifier: Apache-2.0
// Tensors of torch, of any strides, as views of the library. The same source is for torch 1.13 and
// 2.x, so it does not use the stable ABI, which 1.13 lacks.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <refreekv/cache/dense.hpp>
#include <refreekv/core/status.hpp>
#include <utility>

namespace refreekv_torch {

namespace kv = refreekv;

/// Torch's own threads.
struct torch_threads {
  int count = at::get_num_threads();

  [[nodiscard]] int workers() const noexcept { return count; }
  template <class F>
  void run(const F& f) const noexcept {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) f(static_cast<int>(w));
    });
  }
};

/// Requires tensor.dim() == Rank. A Meta tensor has extents and no data.
template <class T, std::size_t Rank>
kv::view<T, Rank> view_of(const at::Tensor& tensor) {
  T* data = tensor.is_meta() ? nullptr : static_cast<T*>(tensor.data_ptr());
  return [&]<std::size_t... Axis>(std::index_sequence<Axis...>) {
    return kv::view<T, Rank>(data, {tensor.size(static_cast<int64_t>(Axis))...},
                             {tensor.stride(static_cast<int64_t>(Axis))...});
  }(std::make_index_sequence<Rank>{});
}

inline void require_shape(const at::Tensor& tensor, const char* name, int64_t rank,
                          const char* shape) {
  TORCH_CHECK(tensor.dim() == rank, "refreekv: ", name, " must be ", shape);
}

inline void require_shape(const at::Tensor& tensor, const char* name, int64_t rank,
                          const char* shape, at::ScalarType type) {
  TORCH_CHECK(tensor.dim() == rank && tensor.scalar_type() == type, "refreekv: ", name, " must be ",
              at::toString(type), " ", shape);
}

/// Calls f(cache, ...) with the caches [batch, kv_head, token, head_dim] as sources of their common
/// element type.
template <class F, class... Others>
void with_caches(const F& f, const at::Tensor& cache, const Others&... others) {
  TORCH_CHECK(((others.scalar_type() == cache.scalar_type()) && ...),
              "refreekv: keys and values must have one type");
  const auto as = [&]<class T>(T) {
    f(kv::dense(view_of<T, 4>(cache)), kv::dense(view_of<T, 4>(others))...);
  };
  switch (cache.scalar_type()) {
    case at::kFloat: return as(float{});
    case at::kBFloat16: return as(kv::bf16_bits{});
    case at::kHalf: return as(kv::f16_bits{});
    default:
      TORCH_CHECK(false, "refreekv: a cache must be float32, bfloat16 or float16, not ",
                  cache.scalar_type());
  }
}

/// Throws the library's words, unless they are null.
inline void require_valid(const char* why_invalid) {
  TORCH_CHECK(why_invalid == nullptr, "refreekv: ", why_invalid);
}

inline void require_ok(kv::status status, const char* verb) {
  TORCH_CHECK(status == kv::status::ok, "refreekv: ", verb, ": ", kv::to_string(status));
}

}  // namespace refreekv_torch
