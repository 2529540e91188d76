// SPDX-License-Identifier: Apache-2.0
// torch.ops.refreekv: the library's verbs on CPU tensors of any strides. The same source is for
// torch 1.13 and 2.x, so it does not use the stable ABI, which 1.13 lacks.
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <refreekv/compact.hpp>
#include <refreekv/cpu/backend.hpp>
#include <refreekv/policy/refreekv.hpp>
#include <refreekv/select.hpp>

namespace {

namespace kv = refreekv;
using kv::index_t;

/// Torch's own threads.
struct torch_threads {
  int count = at::get_num_threads();

  [[nodiscard]] int workers() const noexcept { return count; }
  template <class F>
  void run(const F& f) const noexcept {
    at::parallel_for(0, count, 1, [&](index_t begin, index_t end) {
      for (index_t w = begin; w < end; ++w) f(static_cast<int>(w));
    });
  }
};

/// [batch, head, token, head_dim], as torch has it.
template <class T>
kv::view<T, 4> view_of(const at::Tensor& tensor) {
  const auto size = tensor.sizes(), stride = tensor.strides();
  return {static_cast<T*>(tensor.data_ptr()),
          {size[0], size[1], size[2], size[3]},
          {stride[0], stride[1], stride[2], stride[3]}};
}

/// The library's [sequence, window, q_head, head_dim] of torch's [batch, q_head, window, head_dim].
template <class T>
kv::view<T, 4> queries_of(const at::Tensor& tensor) {
  return view_of<T>(tensor.transpose(1, 2));
}

/// f(dense): of the tensor's element type.
template <class F>
void with_cache(const at::Tensor& cache, const F& f) {
  switch (cache.scalar_type()) {
    case at::kFloat: return f(kv::dense(view_of<float>(cache)));
    case at::kBFloat16: return f(kv::dense(view_of<kv::bf16_bits>(cache)));
    case at::kHalf: return f(kv::dense(view_of<kv::f16_bits>(cache)));
    default:
      TORCH_CHECK(false, "refreekv: a cache must be float32, bfloat16 or float16, not ",
                  cache.scalar_type());
  }
}

template <class T>
T choice(const char* option, const std::string& chosen,
         std::initializer_list<std::pair<const char*, T>> choices) {
  for (const auto& [name, value] : choices) {
    if (chosen == name) return value;
  }
  TORCH_CHECK(false, "refreekv: ", option, " must be ", choices.begin()[0].first, " or ",
              choices.begin()[1].first, ", not ", chosen);
}

/// What does not fit becomes a count that the library refuses, by the option's name.
kv::count_t count_of(int64_t value) {
  return static_cast<kv::count_t>(value < 0 || value > kv::max_count ? ~kv::count_t{0} : value);
}

void require_ok(kv::status status, const char* what) {
  TORCH_CHECK(status == kv::status::ok, "refreekv: ", what, ": ", kv::to_string(status));
}

void check_shapes(const at::Tensor& queries, const at::Tensor& keys) {
  TORCH_CHECK(queries.dim() == 4, "refreekv: queries must be [batch, q_head, row, head_dim]");
  TORCH_CHECK(keys.dim() == 4, "refreekv: keys must be [batch, kv_head, token, head_dim]");
}

at::Tensor empty_kept(const at::Tensor& keys, const std::string& scope) {
  return at::empty({keys.size(0), scope == "kv_head" ? keys.size(1) : 1, 3},
                   keys.options().dtype(at::kInt).requires_grad(false));
}

at::Tensor select_kept(const at::Tensor& queries, const at::Tensor& keys, int64_t layer,
                       double threshold, int64_t sinks, std::string average, std::string norm,
                       std::string scope, int64_t full_layers, double scale) {
  check_shapes(queries, keys);
  TORCH_CHECK(at::isFloatingType(queries.scalar_type()), "refreekv: queries must be floats, not ",
              queries.scalar_type());
  const kv::policy::refreekv rule{
      .threshold = threshold,
      .sinks = count_of(sinks),
      .window = count_of(queries.size(2)),
      .average = choice<kv::row_average>(
          "average", average,
          {{"mean", kv::row_average::mean}, {"frobenius", kv::row_average::frobenius}}),
      .norm = choice<kv::norm_scope>(
          "norm", norm,
          {{"candidates", kv::norm_scope::candidates}, {"full_row", kv::norm_scope::full_row}}),
      .scope = choice<kv::cut_scope>(
          "scope", scope, {{"layer", kv::cut_scope::layer}, {"kv_head", kv::cut_scope::kv_head}}),
      .full_layers = count_of(full_layers)};
  const at::Tensor rows = queries.to(at::kFloat);  // exact from 16 bits, and they are few
  const kv::cpu_backend on{torch_threads{}};
  at::Tensor result = empty_kept(keys, scope);
  with_cache(keys, [&](const auto& cache) {
    const auto seen =
        kv::observe(queries_of<const float>(rows), cache,
                    {.index = layer, .attention = {.scale = static_cast<float>(scale)}});
    std::vector<kv::kept_range> ranges(static_cast<std::size_t>(result.size(0) * result.size(1)));
    const kv::view kept(ranges.data(), {result.size(0), result.size(1)});
    const char* why = kv::why_invalid(rule, seen, kept);
    TORCH_CHECK(why == nullptr, "refreekv: ", why);
    const at::Tensor scratch =
        at::empty({static_cast<int64_t>(kv::workspace_size(rule, on, seen))}, at::kByte);
    require_ok(kv::select(rule, on, seen, kept,
                          {static_cast<std::byte*>(scratch.data_ptr()),
                           static_cast<std::size_t>(scratch.numel())}),
               "select");
    int* out = result.data_ptr<int>();
    for (const kv::kept_range& each : ranges) {
      *out++ = each.sinks;
      *out++ = each.cut;
      *out++ = each.tokens;
    }
  });
  return result;
}

at::Tensor select_kept_meta(const at::Tensor& queries, const at::Tensor& keys, int64_t, double,
                            int64_t, std::string, std::string, std::string scope, int64_t, double) {
  check_shapes(queries, keys);
  return empty_kept(keys, scope);
}

void compact_in_place(at::TensorList caches, const at::Tensor& kept) {
  TORCH_CHECK(kept.dim() == 3 && kept.size(2) == 3 && kept.scalar_type() == at::kInt,
              "refreekv: kept must be int32 [batch, group, 3], as select returns it");
  const auto numbers = kept.contiguous();
  std::vector<kv::kept_range> ranges;
  for (const int* next = numbers.data_ptr<int>(); next != numbers.data_ptr<int>() + kept.numel();
       next += 3) {
    ranges.push_back({.sinks = next[0], .cut = next[1], .tokens = next[2]});
  }
  const kv::view<const kv::kept_range, 2> view(ranges.data(), {kept.size(0), kept.size(1)});
  for (const at::Tensor& cache : caches) {
    TORCH_CHECK(cache.dim() == 4, "refreekv: a cache must be [batch, kv_head, token, head_dim]");
    at::assert_no_internal_overlap(cache);
    with_cache(cache, [&](const auto& rows) {
      require_ok(
          kv::compact(kv::cpu_backend{torch_threads{}}, view, kv::compaction::sinks_up, rows),
          "compact_");
    });
  }
}

void compact_in_place_meta(at::TensorList, const at::Tensor&) {}

}  // namespace

TORCH_LIBRARY(refreekv, m) {
  // queries: the last rows, [batch, q_head, row, head_dim], rotated as the keys are; all of them
  // are the rule's window. keys: [batch, kv_head, token, head_dim].
  // Returns int32 [batch, 1 or kv_head, 3]: sinks, cut, tokens; [0, sinks) and [cut, tokens) stay.
  m.def(
      "select(Tensor queries, Tensor keys, *, int layer, float threshold=0.01, int sinks=4, "
      "str average=\"mean\", str norm=\"candidates\", str scope=\"layer\", int full_layers=2, "
      "float scale=0.0) -> Tensor");
  // Moves the sinks up to the cut, in place: what stays is then narrow(2, cut - sinks,
  // sinks + tokens - cut), a view. Memory comes back with a copy of that view, not before.
  m.def("compact_(Tensor(a!)[] caches, Tensor kept) -> ()");
}

TORCH_LIBRARY_IMPL(refreekv, CPU, m) {
  m.impl("select", select_kept);
  m.impl("compact_", compact_in_place);
}

TORCH_LIBRARY_IMPL(refreekv, Meta, m) {
  m.impl("select", select_kept_meta);
  m.impl("compact_", compact_in_place_meta);
}
