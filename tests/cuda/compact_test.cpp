// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cuda/compact.hpp"

#include "catch.hpp"
#include "emulated_backend.hpp"
#include "layouts.hpp"

using namespace refreekv;

namespace {

/// A random decision of one form or the other about a batch.
class decision {
 public:
  decision(random_source& random, const std::vector<position_t>& lengths, index_t kv_heads)
      : sequences_(static_cast<index_t>(lengths.size())), kv_heads_(kv_heads) {
    capacity_ = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
    groups_ = random.chance(0.5) ? 1 : kv_heads;
    positions_.resize(size(sequences_ * kv_heads * capacity_ * stride), -1);
    const auto at_most = [&](index_t n) { return static_cast<position_t>(random.between(0, n)); };
    for (const position_t tokens : lengths) {
      for (index_t g = 0; g < groups_; ++g) {
        const position_t sinks = std::min(tokens, random.one_of({0, 1, 4, at_most(tokens)}));
        const auto some = static_cast<position_t>(sinks + at_most(tokens - sinks));
        ranges_.push_back({sinks, random.one_of({sinks, tokens, some, some, some}), tokens});
      }
      for (index_t h = 0; h < kv_heads; ++h) {
        const double share = random.one_of({0.0, 0.03, 0.5, 0.97, 1.0});
        position_t* const row = &positions_[counts_.size() * size(capacity_ * stride)];
        kept_tokens count{0, tokens};
        for (position_t t = 0; t < tokens; ++t) {
          if (random.chance(share)) row[stride * count.count++] = t;
        }
        counts_.push_back(count);
      }
    }
  }

  view<const kept_range, 2> ranges() const { return {ranges_.data(), {sequences_, groups_}}; }
  kept_positions<> positions() {
    return {{positions_.data(),
             {sequences_, kv_heads_, capacity_},
             {kv_heads_ * capacity_ * stride, capacity_ * stride, stride}},
            {counts_.data(), {sequences_, kv_heads_}}};
  }

  /// Calls f(kept, how) for both forms and both ways.
  template <class F>
  void for_each_form(const F& f) {
    for (const compaction mode : {compaction::sinks_up, compaction::suffix_down}) {
      INFO((mode == compaction::sinks_up ? "sinks_up" : "suffix_down"));
      f(ranges(), mode);
      f(positions(), mode);
    }
  }

 private:
  static constexpr index_t stride = 2;  // of positions

  index_t sequences_, kv_heads_, groups_, capacity_;
  std::vector<kept_range> ranges_;
  std::vector<position_t> positions_;
  std::vector<kept_tokens> counts_;
};

/// All elements of a cache, dropped ones too.
std::vector<float> contents(const auto& source) {
  std::vector<float> values;
  for (index_t s = 0; s < source.shape().sequences; ++s) {
    for (index_t h = 0; h < source.shape().kv_heads; ++h) {
      for (index_t t = 0; t < source.tokens(s); ++t) {
        const auto run = source.run_at(s, h, t);
        for (index_t d = 0; d < source.shape().head_dim; ++d) {
          values.push_back(to_float(run.data[d * run.dim_stride]));
        }
      }
    }
  }
  return values;
}

template <std::size_t Bytes>
struct raw {
  std::uint8_t bytes[Bytes];
};
struct three_floats {
  float x[3];
};
struct three_doubles {
  double x[3];
};

/// A dense cache of these strides, in elements, somewhere in memory of random bytes.
template <class T>
struct noisy_cache {
  index_t kv_heads, head_dim, dim_stride = 1, padding = 0, offset = 0;
  bool heads_first = true;
  std::vector<position_t> lengths;

  index_t capacity() const { return *std::max_element(lengths.begin(), lengths.end()); }
  index_t row() const { return head_dim * dim_stride + padding; }
  index_t rows() const { return static_cast<index_t>(lengths.size()) * kv_heads * capacity(); }

  /// Two of them, one to compact on the CPU and one by the device's kernels. All bytes are compared
  /// afterwards, those between rows and around them, too.
  bool compacts_as_on_cpu(random_source& random) const {
    bool same = true;
    decision kept(random, lengths, kv_heads);
    kept.for_each_form([&](const auto& form, compaction mode) {
      std::vector<std::max_align_t> expected(size(offset + rows() * row()) * sizeof(T) / 16 + 9);
      std::generate_n(reinterpret_cast<unsigned*>(expected.data()), expected.size() * 4,
                      std::ref(random.engine()));
      std::vector<std::max_align_t> memory = expected;
      const emulation::emulated_backend device{static_cast<unsigned>(random.between(0, 9))};
      REQUIRE(compact(cpu_backend{}, form, mode, in(expected)) == status::ok);
      REQUIRE(cuda_detail::compact(device, in(memory), form, mode) == status::ok);
      same = same && std::memcmp(expected.data(), memory.data(),
                                 expected.size() * sizeof(std::max_align_t)) == 0;
    });
    return same;
  }

 private:
  dense<T> in(std::vector<std::max_align_t>& memory) const {
    const auto sequences = static_cast<index_t>(lengths.size());
    T* const first = reinterpret_cast<T*>(memory.data()) + offset;
    return dense<T>({first,
                     {sequences, kv_heads, capacity(), head_dim},
                     {kv_heads * capacity() * row(), heads_first ? capacity() * row() : row(),
                      heads_first ? row() : kv_heads * row(), dim_stride}},
                    {lengths.data(), {sequences}});
  }
};

}  // namespace

TEMPLATE_TEST_CASE("kernels compact every layout as the CPU does", "[cuda][compact]", float,
                   Eigen::half, bf16_bits) {
  random_source random(base_seed());
  plain_rows rows(2, GENERATE(1, 24, 64), {700, 5, 0, 257, 1, 512});
  for (auto& sequence : rows.values) {
    for (float& v : sequence) v = random.normal();
  }
  decision kept(random, rows.lengths, 2);
  kept.for_each_form([&](const auto& form, compaction mode) {
    std::vector<std::vector<float>> expected;
    for_each_layout<TestType>(rows, [&](const char*, const auto& cache) {
      REQUIRE(compact(cpu_backend{}, form, mode, cache.source()) == status::ok);
      expected.push_back(contents(cache.source()));
    });
    auto next = expected.begin();
    for_each_layout<TestType>(rows, [&](const char* layout, const auto& cache) {
      INFO(layout);
      const emulation::emulated_backend device{static_cast<unsigned>(random.between(0, 9))};
      CHECK(cuda_detail::compact(device, cache.source(), form, mode) == status::ok);
      CHECK(contents(cache.source()) == *next++);
      CHECK(cache.untouched());
    });
  });
}

TEMPLATE_TEST_CASE("kernels compact elements of every size and rows of every alignment",
                   "[cuda][compact]", std::uint8_t, std::uint16_t, float, double, raw<3>,
                   three_floats, three_doubles) {
  random_source random(base_seed() + 1);
  for (index_t i = 0; i < 40; ++i) {
    const noisy_cache<TestType> cache{
        .kv_heads = random.between(1, 3),
        .head_dim = random.one_of<index_t>({8, 16, 64, random.between(1, 130)}),
        .dim_stride = random.one_of<index_t>({1, 1, 1, 2, 5}),
        .padding = random.one_of<index_t>({0, 0, 1, 8, 4}),
        .offset = random.one_of<index_t>({0, 0, 16, 1, 8}),
        .heads_first = random.chance(0.5),
        .lengths = {37, 0, 300}};
    CAPTURE(cache.kv_heads, cache.head_dim, cache.dim_stride, cache.padding, cache.offset,
            cache.heads_first);
    CHECK(cache.compacts_as_on_cpu(random));
  }
}

TEST_CASE("kernels compact rows of every length", "[cuda][compact]") {
  random_source random(base_seed() + 2);
  for (index_t head_dim = 0; head_dim <= 130; ++head_dim) {
    CAPTURE(head_dim);
    const noisy_cache<bf16_bits> cache{
        .kv_heads = 2, .head_dim = head_dim, .padding = head_dim % 3, .lengths = {50, 9}};
    CHECK(cache.compacts_as_on_cpu(random));
  }
}

TEST_CASE("kernels move rows as if through a buffer, however far", "[cuda][compact]") {
  constexpr position_t tokens = 1100;
  for (const position_t sinks : {1, 255, 256, 257, 512, 513, 1030}) {
    for (const position_t dropped : {1, 2, 63, 64, 65, 255, 256, 257, 600}) {
      if (sinks + dropped > tokens) continue;
      for (const compaction mode : {compaction::sinks_up, compaction::suffix_down}) {
        CAPTURE(sinks, dropped, static_cast<int>(mode));
        std::vector<std::int32_t> rows(tokens * 4);
        std::iota(rows.begin(), rows.end(), 0);
        const std::vector<std::int32_t> before = rows;
        const kept_range kept{sinks, sinks + dropped, tokens};
        const dense<std::int32_t> cache({rows.data(), {1, 1, tokens, 4}});
        const emulation::emulated_backend device{static_cast<unsigned>(sinks + dropped)};
        CHECK(cuda_detail::compact(device, cache, view<const kept_range, 2>(&kept, {1, 1}), mode) ==
              status::ok);
        const token_move move = move_of(kept, mode);
        std::vector<std::int32_t> expected = before;
        std::copy_n(before.begin() + move.source * 4, move.tokens * 4,
                    expected.begin() + move.target * 4);
        CHECK(rows == expected);
      }
    }
  }
}

TEST_CASE("kernels have nothing to compact in an empty batch", "[cuda][compact]") {
  const dense<float> none({nullptr, {0, 2, 8, 4}});
  CHECK(cuda_detail::compact(emulation::emulated_backend{}, none,
                             view<const kept_range, 2>(nullptr, {0, 1}),
                             compaction::sinks_up) == status::ok);
  CHECK(cuda_detail::compact(emulation::emulated_backend{}, none, kept_positions<>{},
                             compaction::sinks_up) == status::ok);
}
