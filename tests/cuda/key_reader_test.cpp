// SPDX-License-Identifier: Apache-2.0
// Keys wherever they lie: a device brings them in 16 bytes, in words or element by element.
#include "refreekv/cuda/key_reader.hpp"

#include "catch.hpp"
#include "emulated_backend.hpp"
#include "estimates.hpp"
#include "ranked_selection.hpp"
#include "refreekv/cuda/window_attention.hpp"
#include "selection.hpp"

using namespace refreekv;
using emulation::emulated_backend;

namespace {

constexpr index_t heads = 2, group = 3, tokens = 262, sinks = 4;

/// Statistics of all chunks, by blocks that take turns in `parts` of them.
template <class Layer>
std::vector<float> statistics(const Layer& layer, index_t parts = 0) {
  const index_t chunks = chunking{layer.capacity(), sinks}.count();
  std::vector<chunk_statistics> found(size(layer.sequences() * layer.q_heads() * chunks),
                                      chunk_statistics{-1, -1, -1});
  const emulated_backend exec{base_seed()};
  if (parts == 0) {
    REQUIRE(cuda_detail::read_chunks(exec, layer, 1, 0, 1, sinks, chunks, found.data()) ==
            status::ok);
  } else {
    const cuda_detail::row_parts cut{layer.sequences() * layer.kv_heads(), parts};
    const cuda_detail::statistics_body<Layer, 4, 8> body{
        cuda_detail::scaled(layer), 1, 0, 1, sinks, chunks, cut, found.data()};
    REQUIRE(run_blocks(exec, cut.items(), body) == status::ok);
  }
  std::vector<float> flat;
  for (const chunk_statistics& s : found)
    flat.insert(flat.end(), {s.exponent, s.sum, s.sum_squares});
  return flat;
}

}  // namespace

TEMPLATE_TEST_CASE("keys of any alignment give the same statistics", "[cuda]", float, f16_bits,
                   bf16_bits) {
  for (const index_t dims : {1, 3, 8, 64, 97, 98, 100, 104, 128, 260}) {
    problem p(heads, group, dims, 1, {tokens});
    random_source random(base_seed() + static_cast<unsigned>(dims));
    fill(p, random);
    round_problem<TestType>(p);
    std::vector<float> first;
    for (const index_t pitch : {dims, dims + 1, dims + 2, dims + 8, 2 * dims}) {
      for (const index_t offset : {0, 1, 2, 4}) {
        INFO("head_dim " << dims << " pitch " << pitch << " offset " << offset);
        const index_t dim_stride = pitch == 2 * dims ? 2 : 1;
        // Ends with its last element, for sanitizers to see who reads on.
        canary_buffer<TestType> memory(offset + (heads * tokens - 1) * pitch +
                                       (dims - 1) * dim_stride + 1);
        const dense<TestType> keys(view<TestType, 4>(memory.data() + offset,
                                                     {1, heads, tokens, dims},
                                                     {0, tokens * pitch, pitch, dim_stride}));
        memory.fill(keys, p.keys);
        const auto found = statistics(observe(p.query_view(), keys, p.info()));
        if (first.empty()) first = found;
        CHECK(found == first);
      }
    }
  }
}

TEST_CASE("4-bit keys of any alignment give the products that their codes say", "[cuda]") {
  for (const index_t dims : {1, 2, 7, 16, 100, 127, 128, 130, 256}) {
    for (const bool centred : {false, true}) {
      problem p(heads, group, dims, 1, {5});
      random_source random(base_seed() + static_cast<unsigned>(dims));
      fill(p, random);
      p.scale = 1;
      const dense_cache<float> keys(p.keys);
      estimates made(keys.source(), p.lengths, 4, centred);
      REQUIRE(quantise(cpu_backend{}, keys.source(), made.keys()) == status::ok);
      std::vector<float> first;
      for (const index_t pitch : {0, 1, 4, 8, 13}) {
        INFO("head_dim " << dims << " pitch + " << pitch << (centred ? " centred" : ""));
        int4_keys<> codes = made.keys();
        const index_t bytes = codes.codes.extent(3), row = bytes + pitch;
        std::vector<std::uint8_t> moved(size(heads * codes.shape().capacity * row), 0xA5);
        const view<std::uint8_t, 4> to(moved.data(), {1, heads, codes.shape().capacity, bytes},
                                       {0, codes.shape().capacity * row, row, 1});
        for (index_t h = 0; h < heads; ++h) {
          for (index_t t = 0; t < p.lengths[0]; ++t) {
            std::copy_n(codes.codes.at(0, h, t), bytes, to.at(0, h, t));
          }
        }
        codes.codes = to;
        const auto found = statistics(observe(p.query_view(), codes, p.info()));
        if (first.empty()) first = found;
        CHECK(found == first);
        // Of 5 tokens the second chunk holds one: its statistics are its logit.
        for (index_t h = 0; h < heads * group; ++h) {
          double logit = 0, magnitude = 0;
          const std::vector<double> key = made.key(0, h / group, 4);
          for (index_t d = 0; d < dims; ++d) {
            logit += double{p.query(0, 0, h, d)} * key[size(d)];
            magnitude += std::abs(double{p.query(0, 0, h, d)}) * std::abs(key[size(d)]);
          }
          const float *of = &found[size((h * 2 + 1) * 3)], exponent = of[0];
          CHECK(std::log(double{of[1]}) + double{exponent} * std::numbers::ln2 ==
                Approx(logit).margin(1e-5 * magnitude + 1e-5));
        }
      }
    }
  }
}

TEST_CASE("blocks that step over chunks read the same ones", "[cuda]") {
  problem p(heads, group, 8, 1, {1100, 0, 3, 600});
  random_source random(base_seed());
  fill(p, random);
  const dense_cache<float> keys(p.keys);
  const auto layer = observe(p.query_view(), keys.source(), p.info());
  const std::vector<float> all = statistics(layer, chunking{1100, sinks}.count());
  CHECK(statistics(layer) == all);
  for (const index_t parts : {1, 2, 3, 5}) CHECK(statistics(layer, parts) == all);
}

TEST_CASE("4-bit keys decide as the numbers that they stand for", "[cuda]") {
  // Without sinks the first chunk is empty.
  problem p(heads, group, 32, 16, {300, 0, 20});
  random_source random(base_seed() + 1);
  fill(p, random);
  const dense_cache<float> keys(p.keys);
  for (const bool centred : {false, true}) {
    estimates made(keys.source(), p.lengths, 4, centred);
    REQUIRE(quantise(cpu_backend{}, keys.source(), made.keys()) == status::ok);
    problem meant = p;
    for (index_t s = 0; s < p.sequences(); ++s) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t t = 0; t < p.lengths[size(s)]; ++t) {
          const std::vector<double> key = made.key(s, h, t);
          for (index_t d = 0; d < p.head_dim; ++d) {
            meant.keys.at(s, h, t, d) = static_cast<float>(key[size(d)]);
          }
        }
      }
    }
    const dense_cache<float> numbers(meant.keys);
    const emulated_backend exec{base_seed()};
    const auto codes = observe(p.query_view(), made.keys(), p.info());
    const auto floats = observe(p.query_view(), numbers.source(), p.info());
    for (const policy::snapkv& policy :
         {policy::snapkv{.budget = 60, .window = 1}, policy::snapkv{.budget = 60, .window = 16}}) {
      const ranked_selection a = run_ranked(policy, exec, codes),
                             b = run_ranked(policy, exec, floats);
      REQUIRE(a.status == status::ok);
      CHECK(a.kept == b.kept);
    }
    for (const count_t no_sinks : {0u, 4u}) {
      const policy::refreekv policy{.threshold = 0.05, .sinks = no_sinks, .window = 16};
      const selection a = run_select(policy, exec, codes), b = run_select(policy, exec, floats);
      REQUIRE(a.status == status::ok);
      for (index_t s = 0; s < p.sequences(); ++s) CHECK(a.at(s, 0).cut == b.at(s, 0).cut);
    }
  }
}
