// SPDX-License-Identifier: Apache-2.0
// Each engine's memory is filled by the formula that its own documentation gives, and read, and
// written, through the sources; the formulas know nothing of strides.
#include "refreekv/cache/layouts.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "catch.hpp"

using namespace refreekv;

namespace {

/// Where one element of the cache is: `half` 0 is a key, 1 a value.
struct element {
  index_t half, page, head, slot, dim;
};

/// Elements from the first of the pool to the one that is asked for.
using formula = std::function<index_t(const layouts::extents&, const element&)>;

/// Index of an element of a tensor in C order.
index_t at(std::initializer_list<index_t> shape, std::initializer_list<index_t> index) {
  index_t offset = 0;
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    const index_t size = shape.begin()[axis], i = index.begin()[axis];
    if (i < 0 || i >= size) throw std::out_of_range("an element outside the engine's tensor");
    offset = offset * size + i;
  }
  return offset;
}

/// Calls f(name, layout, formula, layers) for each engine's layout that is one tensor.
template <class F>
void for_each_tensor(const F& f) {
  using extents = layouts::extents;
  f("vLLM, K/V first, NHD", layouts::vllm_kv_first_nhd, [](const extents& n, const element& e) {
    return at({2, n.pages, n.page_tokens, n.kv_heads, n.head_dim},
              {e.half, e.page, e.slot, e.head, e.dim});
  });
  f("vLLM, K/V first, HND", layouts::vllm_kv_first_hnd, [](const extents& n, const element& e) {
    return at({2, n.pages, n.kv_heads, n.page_tokens, n.head_dim},
              {e.half, e.page, e.head, e.slot, e.dim});
  });
  f("vLLM, blocks first", layouts::vllm_blocks_first, [](const extents& n, const element& e) {
    return at({n.pages, 2, n.page_tokens, n.kv_heads, n.head_dim},
              {e.page, e.half, e.slot, e.head, e.dim});
  });
  f("vLLM, packed", layouts::vllm_packed, [](const extents& n, const element& e) {
    return at({n.pages, n.kv_heads, n.page_tokens, 2 * n.head_dim},
              {e.page, e.head, e.slot, e.half * n.head_dim + e.dim});
  });
  f("FlashInfer, NHD", layouts::flashinfer_nhd, [](const extents& n, const element& e) {
    return at({n.pages, 2, n.page_tokens, n.kv_heads, n.head_dim},
              {e.page, e.half, e.slot, e.head, e.dim});
  });
  f("FlashInfer, HND", layouts::flashinfer_hnd, [](const extents& n, const element& e) {
    return at({n.pages, 2, n.kv_heads, n.page_tokens, n.head_dim},
              {e.page, e.half, e.head, e.slot, e.dim});
  });
  f("TensorRT-LLM", layouts::tensorrt_llm, [](const extents& n, const element& e) {
    return at({n.pages, n.layers, 2, n.kv_heads, n.page_tokens, n.head_dim},
              {e.page, n.layer, e.half, e.head, e.slot, e.dim});
  });
}

/// The same for engines with a tensor of keys and one of values, whose `half` is not looked at.
template <class F>
void for_each_pair(const F& f) {
  using extents = layouts::extents;
  f("FlashInfer, NHD, two tensors", layouts::flashinfer_nhd,
    [](const extents& n, const element& e) {
      return at({n.pages, n.page_tokens, n.kv_heads, n.head_dim}, {e.page, e.slot, e.head, e.dim});
    });
  f("FlashInfer, HND, two tensors", layouts::flashinfer_hnd,
    [](const extents& n, const element& e) {
      return at({n.pages, n.kv_heads, n.page_tokens, n.head_dim}, {e.page, e.head, e.slot, e.dim});
    });
  f("llama.cpp", layouts::llama_cpp, [](const extents& n, const element& e) {
    return at({n.pages, n.page_tokens, n.kv_heads * n.head_dim},
              {e.page, e.slot, e.head * n.head_dim + e.dim});
  });
  f("llama.cpp without flash attention", layouts::llama_cpp_transposed,
    [](const extents& n, const element& e) {
      return e.half == 0 ? at({n.pages, n.page_tokens, n.kv_heads * n.head_dim},
                              {e.page, e.slot, e.head * n.head_dim + e.dim})
                         : at({n.pages, n.kv_heads * n.head_dim, n.page_tokens},
                              {e.page, e.head * n.head_dim + e.dim, e.slot});
    });
}

/// SGLang's slots are pages of one token.
index_t sglang_formula(const layouts::extents& n, const element& e) {
  return at({n.pages, n.kv_heads, n.head_dim}, {e.page, e.head, e.dim});
}

std::size_t elements_of(const layouts::extents& n) {
  return static_cast<std::size_t>(2 * n.pages * n.layers * n.kv_heads * n.page_tokens * n.head_dim);
}

/// A number that no other element has.
float number_of(const element& e) {
  return static_cast<float>((((e.half * 64 + e.page) * 16 + e.head) * 32 + e.slot) * 16 +
                            e.dim);  // < 2^24: exact
}

template <class Source>
float& element_at(const Source& source, index_t sequence, index_t head, index_t token,
                  index_t dim) {
  const auto run = source.run_at(sequence, head, token);
  return run.data[dim * run.dim_stride];
}

/// Where a sequence's token is: the page and the slot on it.
using place = std::function<std::pair<index_t, index_t>(index_t sequence, index_t token)>;

/// What the engine wrote is what the sources show, and the other way round. halves: of the engine's
/// memory.
template <class Keys, class Values>
void check_both_ways(const keys_and_values<Keys, Values>& sources, std::array<float*, 2> halves,
                     const layouts::extents& n, const formula& offset, const place& find,
                     const std::vector<position_t>& lengths) {
  CHECK(sources.keys.invalid() == nullptr);
  CHECK(sources.values.invalid() == nullptr);
  const auto for_each_element = [&](const auto& f) {
    for (index_t s = 0; s < static_cast<index_t>(lengths.size()); ++s) {
      for (index_t t = 0; t < lengths[static_cast<std::size_t>(s)]; ++t) {
        const auto [page, slot] = find(s, t);
        for (index_t h = 0; h < n.kv_heads; ++h) {
          for (index_t d = 0; d < n.head_dim; ++d) {
            for (const index_t half : {0, 1}) {
              const element e{half, page, h, slot, d};
              float& raw = halves[static_cast<std::size_t>(half)][offset(n, e)];
              f(e, raw,
                half == 0 ? element_at(sources.keys, s, h, t, d)
                          : element_at(sources.values, s, h, t, d));
            }
          }
        }
      }
    }
  };
  bool reads = true, writes = true;
  for_each_element([&](const element& e, float& raw, float&) { raw = number_of(e); });
  for_each_element([&](const element& e, float&, float& layer) { reads &= layer == number_of(e); });
  for_each_element([&](const element& e, float&, float& layer) { layer = -number_of(e) - 1; });
  for_each_element(
      [&](const element& e, float& raw, float&) { writes &= raw == -number_of(e) - 1; });
  CHECK(reads);
  CHECK(writes);
  for (index_t s = 0; s < static_cast<index_t>(lengths.size()); ++s) {
    CHECK(sources.keys.tokens(s) == lengths[static_cast<std::size_t>(s)]);
    CHECK(sources.values.tokens(s) == lengths[static_cast<std::size_t>(s)]);
  }
}

/// Sequences whose pages are in random order of a pool, as a padded table and as a ragged one.
template <class Index>
struct random_table {
  std::vector<position_t> lengths{37, 0, 1, 16}, last;
  index_t page_tokens, width;
  std::vector<Index> padded_ids, ids, offsets{0};

  random_table(index_t pages, index_t tokens_of_page)
      : page_tokens(tokens_of_page), width((37 + tokens_of_page - 1) / tokens_of_page) {
    std::vector<Index> pool(static_cast<std::size_t>(pages));
    std::iota(pool.begin(), pool.end(), Index{0});
    std::shuffle(pool.begin(), pool.end(), std::mt19937(5));
    for (const position_t length : lengths) {
      const index_t used = (length + page_tokens - 1) / page_tokens;
      for (index_t p = 0; p < width; ++p) {
        padded_ids.push_back(p < used ? pool.back() : Index{-1});
        if (p >= used) continue;
        ids.push_back(pool.back());
        pool.pop_back();
      }
      offsets.push_back(static_cast<Index>(ids.size()));
      last.push_back(used == 0 ? 0 : static_cast<position_t>(length - (used - 1) * page_tokens));
    }
  }
  index_t sequences() const { return static_cast<index_t>(lengths.size()); }
  page_table<Index> padded() const {
    return page_table<Index>::padded({padded_ids.data(), {sequences(), width}},
                                     {lengths.data(), {sequences()}});
  }
  page_table<Index> ragged() const {
    return page_table<Index>::ragged({ids.data(), {static_cast<index_t>(ids.size())}},
                                     {offsets.data(), {sequences() + 1}},
                                     {last.data(), {sequences()}}, width);
  }
  std::pair<index_t, index_t> find(index_t s, index_t t) const {
    return {padded_ids[static_cast<std::size_t>(s * width + t / page_tokens)], t % page_tokens};
  }
};

}  // namespace

TEMPLATE_TEST_CASE("engines' pages hold what they wrote, and what is written through the sources",
                   "[layouts]", std::int32_t, std::int64_t) {
  const layouts::extents n{
      .pages = 17, .page_tokens = 4, .kv_heads = 3, .head_dim = 5, .layers = 3, .layer = 1};
  const random_table<TestType> table(n.pages, n.page_tokens);
  const place find = [&](index_t s, index_t t) { return table.find(s, t); };
  std::vector<float> keys(elements_of(n)), values(elements_of(n));
  for_each_tensor([&](const char* name, const auto& layout, const formula& offset) {
    INFO(name);
    const std::array pool{keys.data(), keys.data()};
    check_both_ways(layout(keys.data(), n, table.padded()), pool, n, offset, find, table.lengths);
    check_both_ways(layout(keys.data(), n, table.ragged()), pool, n, offset, find, table.lengths);
  });
  const std::array both{keys.data(), values.data()};
  for_each_pair([&](const char* name, const auto& layout, const formula& offset) {
    INFO(name);
    check_both_ways(layout(keys.data(), values.data(), n, table.padded()), both, n, offset, find,
                    table.lengths);
  });

  const layouts::extents slots{.pages = 60, .page_tokens = 1, .kv_heads = 3, .head_dim = 5};
  const random_table<TestType> req_to_token(slots.pages, 1);
  check_both_ways(
      layouts::sglang(keys.data(), values.data(), slots, req_to_token.padded()), both, slots,
      sglang_formula, [&](index_t s, index_t t) { return req_to_token.find(s, t); },
      req_to_token.lengths);
}

TEST_CASE("llama.cpp's streams hold what it wrote, and what is written through the sources",
          "[layouts]") {
  const layouts::extents n{.pages = 2, .page_tokens = 19, .kv_heads = 3, .head_dim = 5};
  std::vector<float> keys(elements_of(n) / 2), values(elements_of(n) / 2);
  std::vector<position_t> lengths{19, 7};
  const place cell = [](index_t stream, index_t t) { return std::pair(stream, t); };
  for_each_pair([&](const char* name, const auto& layout, const formula& offset) {
    INFO(name);
    const view used(lengths.data(), {2});
    check_both_ways(layout(keys.data(), values.data(), n, used), {keys.data(), values.data()}, n,
                    offset, cell, lengths);
    CHECK(layout(keys.data(), values.data(), n, lengths_view<>{}).values.tokens(1) == 19);
  });
}

TEST_CASE("pages past 2^31 and 2^32 elements are where the engine has them", "[layouts]") {
  // Address space of which hardly any page is ever touched.
  const std::size_t bytes = std::size_t{5} << 32;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  REQUIRE(memory != MAP_FAILED);
  auto* pool = static_cast<float*>(memory);
  const layouts::extents one_layer{
      .pages = 160'000, .page_tokens = 16, .kv_heads = 8, .head_dim = 128};
  const auto check = [&](const auto& layout, auto* keys, auto* values, const auto& n,
                         const formula& offset) {
    // The last page, and those around 2^31 and 2^32 elements.
    const index_t page_elements = n.page_tokens * n.kv_heads * n.head_dim * n.layers * 2;
    std::vector<std::int32_t> ids{static_cast<std::int32_t>(n.pages - 1)};
    for (const index_t limit : {index_t{1} << 31, index_t{1} << 32}) {
      const auto page = static_cast<std::int32_t>(std::min(limit / page_elements, n.pages - 2));
      if (page != ids.back()) ids.push_back(page);
    }
    const auto pages = static_cast<index_t>(ids.size());
    const auto length = static_cast<position_t>(pages * n.page_tokens);
    const auto table = page_table<std::int32_t>::padded({ids.data(), {1, pages}}, {&length, {1}});
    const auto sources = layout(keys, values, n, table);
    index_t farthest = 0;
    for (index_t t = 0; t < length; ++t) {
      for (const index_t head : {index_t{0}, n.kv_heads - 1}) {
        for (const index_t dim : {index_t{0}, n.head_dim - 1}) {
          const index_t page = ids[static_cast<std::size_t>(t / n.page_tokens)];
          const index_t slot = t % n.page_tokens;
          const index_t key = offset(n, {0, page, head, slot, dim});
          const index_t value = offset(n, {1, page, head, slot, dim});
          CHECK(&element_at(sources.keys, 0, head, t, dim) == keys + key);
          CHECK(&element_at(sources.values, 0, head, t, dim) == values + value);
          element_at(sources.values, 0, head, t, dim) = 1;
          CHECK(values[value] == 1);
          farthest = std::max(farthest, value);
        }
      }
    }
    CHECK(farthest > index_t{1} << 32);
    CHECK(farthest * index_t{sizeof(float)} < static_cast<index_t>(bytes));
    madvise(memory, bytes, MADV_DONTNEED);
  };
  for_each_tensor([&](const char* name, const auto& layout, const formula& offset) {
    INFO(name);
    const bool has_layers = std::string(name) == "TensorRT-LLM";
    layouts::extents n = one_layer;
    if (has_layers) n.pages /= 32, n.layers = 32, n.layer = 31;
    const auto of_pool = [&](float* keys, float*, const layouts::extents& of, const auto& table) {
      return layout(keys, of, table);
    };
    check(of_pool, pool, pool, n, offset);
  });
  layouts::extents n = one_layer;
  n.pages *= 2;
  for_each_pair([&](const char* name, const auto& layout, const formula& offset) {
    INFO(name);
    check(layout, pool, pool, n, offset);
  });
  n.pages *= n.page_tokens;
  n.page_tokens = 1;
  check(layouts::sglang, pool, pool, n, sglang_formula);
  munmap(memory, bytes);
}

namespace {

template <class Layout>
concept is_one_tensor =
    requires(const Layout& layout, float* pool, page_table<std::int32_t> table) {
      layout(pool, layouts::extents{}, table);
    };
static_assert(is_one_tensor<decltype(layouts::vllm_packed)>);
static_assert(!is_one_tensor<decltype(layouts::sglang)>);
static_assert(!is_one_tensor<decltype(layouts::llama_cpp)>);

// The sources are where the table is, and nothing happens at run time.
constexpr auto on_device = layouts::vllm_packed(static_cast<bf16_bits*>(nullptr), {},
                                                page_table<std::int64_t, device_memory>{});
static_assert(
    std::same_as<decltype(on_device.keys), paged<bf16_bits, std::int64_t, device_memory>>);
constexpr auto cells =
    layouts::llama_cpp(static_cast<f16_bits*>(nullptr), static_cast<f16_bits*>(nullptr), {},
                       lengths_view<device_memory>{});
static_assert(std::same_as<decltype(cells.values), dense<f16_bits, device_memory>>);

}  // namespace
