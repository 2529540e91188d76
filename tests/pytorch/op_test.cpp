// SPDX-License-Identifier: Apache-2.0
// torch.ops.refreekv against the library called directly, on tensors of any type and strides.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <refreekv/compact.hpp>
#include <refreekv/cpu/backend.hpp>
#include <refreekv/policy/refreekv.hpp>
#include <refreekv/select.hpp>

#undef CHECK  // torch's, which aborts
#include "catch.hpp"

using namespace refreekv;
using Catch::Matchers::Contains;

namespace {

template <class Signature>
auto op(const char* name) {
  static void* const library = dlopen(REFREEKV_TORCH_LIBRARY, RTLD_NOW);
  if (library == nullptr) throw std::runtime_error(dlerror());
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct options {
  int64_t layer = 9;
  double threshold = 0.2;
  int64_t sinks = 4;
  std::string average = "mean", norm = "candidates", scope = "layer";
  int64_t full_layers = 2;
  double scale = 0;
};

at::Tensor select(const at::Tensor& queries, const at::Tensor& keys, const options& o = {}) {
  return op<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, double, int64_t, std::string,
                       std::string, std::string, int64_t, double)>("refreekv::select")
      .call(queries, keys, o.layer, o.threshold, o.sinks, o.average, o.norm, o.scope, o.full_layers,
            o.scale);
}

void compact(std::vector<at::Tensor> caches, const at::Tensor& kept) {
  op<void(at::TensorList, const at::Tensor&)>("refreekv::compact_").call(caches, kept);
}

template <class T>
view<const T, 4> plain(const at::Tensor& t) {
  return {static_cast<const T*>(t.data_ptr()), {t.size(0), t.size(1), t.size(2), t.size(3)}};
}

/// What the library says of the same numbers in plain arrays.
template <class T>
std::vector<int> direct(const at::Tensor& queries, const at::Tensor& keys, const options& o) {
  const auto q = queries.to(at::kFloat).transpose(1, 2).contiguous(), k = keys.contiguous();
  const policy::refreekv rule{
      .threshold = o.threshold,
      .sinks = static_cast<count_t>(o.sinks),
      .window = static_cast<count_t>(queries.size(2)),
      .average = o.average == "mean" ? row_average::mean : row_average::frobenius,
      .norm = o.norm == "candidates" ? norm_scope::candidates : norm_scope::full_row,
      .scope = o.scope == "layer" ? cut_scope::layer : cut_scope::kv_head,
      .full_layers = static_cast<count_t>(o.full_layers)};
  const auto seen =
      observe(plain<float>(q), dense(plain<T>(k)),
              {.index = o.layer, .attention = {.scale = static_cast<float>(o.scale)}});
  const cpu_backend on;
  const index_t groups = groups_of(rule, seen);
  std::vector<kept_range> kept(static_cast<std::size_t>(keys.size(0) * groups));
  std::vector<std::byte> scratch(workspace_size(rule, on, seen));
  REQUIRE(select(rule, on, seen, {kept.data(), {keys.size(0), groups}}, scratch) == status::ok);
  std::vector<int> numbers;
  for (const kept_range& each : kept) {
    numbers.insert(numbers.end(), {each.sinks, each.cut, each.tokens});
  }
  return numbers;
}

std::vector<int> direct(const at::Tensor& queries, const at::Tensor& keys, const options& o) {
  switch (keys.scalar_type()) {
    case at::kFloat: return direct<float>(queries, keys, o);
    case at::kBFloat16: return direct<bf16_bits>(queries, keys, o);
    default: return direct<f16_bits>(queries, keys, o);
  }
}

std::vector<int> numbers_of(const at::Tensor& kept) {
  const int* first = kept.data_ptr<int>();
  return {first, first + kept.numel()};
}

constexpr int64_t batch = 2, q_heads = 6, kv_heads = 2, tokens = 700, head_dim = 16;

at::Tensor random_queries(int64_t rows = 3) {
  return 2 * at::randn({batch, q_heads, rows, head_dim});
}
at::Tensor random_keys() { return at::randn({batch, kv_heads, tokens, head_dim}); }

}  // namespace

TEST_CASE("the op decides as the library does") {
  at::manual_seed(7);
  const auto type = GENERATE(at::kFloat, at::kBFloat16, at::kHalf);
  const auto layout = GENERATE(0, 1, 2, 3);
  CAPTURE(type, layout);
  at::Tensor queries = random_queries().to(type), keys = random_keys().to(type);
  if (layout == 1) {  // token-major, as a projection leaves them
    queries = queries.transpose(1, 2).contiguous().transpose(1, 2);
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2);
  } else if (layout == 2) {  // every other token and element of something larger
    keys = at::randn({batch, kv_heads, 2 * tokens, 2 * head_dim})
               .to(type)
               .slice(2, 0, 2 * tokens, 2)
               .slice(3, 1, 2 * head_dim, 2);
  } else if (layout == 3) {  // one KV head that stands for all
    keys = keys.slice(1, 0, 1).expand({batch, kv_heads, tokens, head_dim});
  }
  REQUIRE(keys.is_contiguous() == (layout == 0));

  const auto o = GENERATE(options{}, options{.sinks = 0, .average = "frobenius", .scale = 0.5},
                          options{.norm = "full_row", .scope = "kv_head"}, options{.layer = 1});
  const auto kept = select(queries, keys, o);
  CHECK(kept.size(0) == batch);
  CHECK(kept.size(1) == (o.scope == "layer" ? 1 : kv_heads));
  CHECK(numbers_of(kept) == direct(queries, keys, o));
  const bool drops = (kept.select(2, 1) > o.sinks).any().item<bool>();
  CHECK(drops == (o.layer >= o.full_layers));  // the data is such that there is something to decide

  const int threads = at::get_num_threads();
  at::set_num_threads(3);
  CHECK(at::equal(select(queries, keys, o), kept));
  at::set_num_threads(threads);
}

TEST_CASE("compact_ moves the sinks up, in place") {
  at::manual_seed(8);
  const auto type = GENERATE(at::kFloat, at::kBFloat16, at::kHalf);
  const bool token_major = GENERATE(false, true);
  const options o{.scope = GENERATE("layer", "kv_head")};
  at::Tensor keys = random_keys().to(type), values = random_keys().to(type);
  if (token_major) keys = keys.transpose(1, 2).contiguous().transpose(1, 2);
  const auto kept = select(random_queries(), keys, o);
  const auto keys_before = keys.clone(), values_before = values.clone();
  compact({keys, values}, kept);
  for (int64_t s = 0; s < batch; ++s) {
    for (int64_t h = 0; h < kv_heads; ++h) {
      const auto range = kept[s][o.scope == "layer" ? 0 : h];
      const auto sinks = range[0].item<int64_t>(), cut = range[1].item<int64_t>();
      for (const auto& [now, before] : {std::pair{keys, keys_before}, {values, values_before}}) {
        const auto stays = now[s][h].narrow(0, cut - sinks, sinks + tokens - cut);
        CHECK(at::equal(stays,
                        at::cat({before[s][h].slice(0, 0, sinks), before[s][h].slice(0, cut)})));
        CHECK(stays.is_alias_of(now));
      }
    }
  }
}

TEST_CASE("what is wrong is said in the library's words") {
  const auto queries = random_queries(), keys = random_keys();
  const auto refused = [&](const char* why, const options& o) {
    CHECK_THROWS_WITH(select(queries, keys, o), Contains(why));
  };
  refused("threshold must be in [0, 1]", {.threshold = 1.5});
  refused("sinks must be >= 0", {.sinks = -1});
  refused("sinks must be >= 0", {.sinks = (int64_t{1} << 32) + 4});
  refused("full_layers must be >= 0", {.full_layers = -2});
  refused("index is not set", {.layer = -1});
  refused("index must be >= 0", {.layer = -2});
  refused("scale must be finite", {.scale = -1});
  refused("average must be mean or frobenius, not median", {.average = "median"});
  refused("norm must be candidates or full_row, not l1", {.norm = "l1"});
  refused("scope must be layer or kv_head, not head", {.scope = "head"});

  CHECK_THROWS_WITH(select(random_queries(0), keys), Contains("window must be >= 1"));
  CHECK_THROWS_WITH(select(queries.slice(0, 0, 1), keys), Contains("differ in sequences"));
  CHECK_THROWS_WITH(select(queries.slice(3, 0, 8), keys), Contains("differ in head_dim"));
  CHECK_THROWS_WITH(select(queries.slice(1, 0, 5), keys), Contains("multiple of kv_heads"));
  CHECK_THROWS_WITH(select(queries[0], keys), Contains("queries must be [batch, q_head"));
  CHECK_THROWS_WITH(select(queries, keys[0]), Contains("keys must be [batch, kv_head"));
  CHECK_THROWS_WITH(select(queries, keys.to(at::kDouble)),
                    Contains("float32, bfloat16 or float16"));
  CHECK_THROWS_WITH(select(queries.to(at::kInt), keys), Contains("queries must be floats"));

  const auto kept = select(queries, keys);
  CHECK_THROWS_WITH(compact({keys.slice(2, 1)}, kept), Contains("invalid argument"));
  CHECK_THROWS_WITH(compact({keys}, kept.to(at::kLong)), Contains("kept must be int32"));
  CHECK_THROWS_WITH(compact({keys.slice(1, 0, 1).expand_as(keys)}, kept),
                    Contains("single memory"));
}

TEST_CASE("shapes are known without data") {
  const c10::InferenceMode inference;  // torch 1.13 has no fallback for gradients of Meta tensors
  const auto meta = [](const at::Tensor& t) { return t.to(at::kMeta); };
  const auto queries = random_queries(), keys = random_keys();
  for (const options& o : {options{}, options{.scope = "kv_head"}}) {
    CHECK(select(meta(queries), meta(keys), o).sizes() == select(queries, keys, o).sizes());
  }
}
