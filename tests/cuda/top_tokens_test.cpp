// SPDX-License-Identifier: Apache-2.0
// Selections of emulated blocks against sorting, and against the CPU's.
#include "refreekv/cuda/top_tokens.hpp"

#include "catch.hpp"
#include "emulated_backend.hpp"
#include "estimates.hpp"
#include "refreekv/cuda/head_quotas.hpp"
#include "refreekv/cuda/key_index.hpp"
#include "refreekv/cuda/ranked_scan.hpp"

using namespace refreekv;
using cuda_detail::infinity;
using cuda_detail::not_a_number;
using cuda_detail::row_cut;
using emulation::emulated_backend;

namespace {

constexpr float denormal = std::numeric_limits<float>::denorm_min();
constexpr unsigned orders[] = {0, 1, 20251124};
/// A block a row, and over a grid: with parts that end where blocks of tokens do, or anywhere.
constexpr row_cut cuts[] = {{1}, {3, 256}, {8, 51}};

/// Calls find(block, shared, row) in one block, with a row of stride 2.
template <class Shared, class Find>
struct limit_body {
  using shared = Shared;
  cuda_detail::value_row row;
  Find find;
  cuda_detail::value_limit* limit;

  template <cuda_detail::thread_block Block>
  void operator()(Block& block, shared& s, index_t) const noexcept {
    const cuda_detail::value_limit found = find(block, s, row);
    if (block.rank() == 0) *limit = found;
  }
};

/// Tokens that the limit takes which `find` finds, whatever the order of threads is.
template <class Shared, class Find>
std::vector<index_t> taken(const std::vector<float>& values, const Find& find) {
  std::vector<float> spread;
  for (const float v : values) spread.insert(spread.end(), {v, not_a_number});
  std::vector<index_t> first;
  for (const unsigned order : orders) {
    cuda_detail::value_limit limit{};
    const limit_body<Shared, Find> body{{spread.data(), 2}, find, &limit};
    REQUIRE(run_blocks(emulated_backend{order}, 1, body) == status::ok);
    std::vector<index_t> tokens;
    for (index_t t = 0; t < static_cast<index_t>(values.size()); ++t) {
      if (limit.selects(values[size(t)], t)) tokens.push_back(t);
    }
    if (order == orders[0]) first = tokens;
    REQUIRE(tokens == first);
  }
  return first;
}

std::vector<index_t> largest(const std::vector<float>& values, index_t k) {
  return taken<cuda_detail::limit_memory<cuda_detail::count_bins>>(
      values, [count = static_cast<index_t>(values.size()), k](auto& block, auto& s, auto row) {
        return cuda_detail::limit_of_largest(block, s, row, count, k);
      });
}

std::vector<index_t> holding(const std::vector<float>& values, double share) {
  double sum = 0;
  for (const float v : values) sum += double{v};
  return taken<cuda_detail::limit_memory<cuda_detail::mass_bins>>(
      values,
      [count = static_cast<index_t>(values.size()), sum, share](auto& block, auto& s, auto row) {
        return cuda_detail::limit_by_mass(block, s, row, count, sum, share * sum);
      });
}

/// Tokens, the one with the largest value first, the earlier ones among equals.
std::vector<index_t> ranked(const std::vector<float>& values) {
  std::vector<index_t> tokens(values.size());
  std::iota(tokens.begin(), tokens.end(), index_t{0});
  std::stable_sort(tokens.begin(), tokens.end(),
                   [&](index_t a, index_t b) { return values[size(a)] > values[size(b)]; });
  return tokens;
}

/// The first `count` of `tokens`, ascending.
std::vector<index_t> first_of(std::vector<index_t> tokens, std::size_t count) {
  tokens.resize(count);
  std::sort(tokens.begin(), tokens.end());
  return tokens;
}

template <class F>
std::vector<float> filled(index_t count, const F& f) {
  std::vector<float> values(size(count));
  std::generate(values.begin(), values.end(), f);
  return values;
}

/// Rows that a selection by digits of floats may stumble on.
std::vector<std::vector<float>> nasty_rows(random_source& random, index_t count) {
  return {
      filled(count, [&] { return random.normal(); }),
      filled(count, [&] { return static_cast<float>(random.between(-2, 2)); }),
      filled(count, [&] { return random.one_of({0.0f, -0.0f}); }),
      filled(count, [&] { return random.one_of({0.0f, -0.0f, denormal, -denormal}); }),
      filled(count, [&] { return static_cast<float>(random.between(0, 300)) * denormal; }),
      filled(count,
             [&] { return random.one_of({infinity, -infinity, 1.0f, -1.0f, 3.4e38f, -3.4e38f}); }),
      filled(count, [&] { return 0.1f; }),
      filled(count, [&] { return 1 + static_cast<float>(random.between(0, 9)) * 0x1p-23f; }),
      filled(count, [&] { return std::exp(random.normal(40)); }),
  };
}

/// Attention as a softmax gives it; with `ties`, of few values.
std::vector<float> softmax_row(random_source& random, index_t count, bool ties = false) {
  std::vector<float> row = filled(count, [&] {
    return std::exp(ties ? static_cast<float>(random.between(-3, 0)) : random.normal(3));
  });
  double sum = 0;
  for (const float v : row) sum += double{v};
  for (float& v : row) v = static_cast<float>(double{v} / sum);
  return row;
}

constexpr index_t counts[] = {1, 2, 255, 256, 257, 700, 2049};

}  // namespace

TEST_CASE("a block takes the largest values, the first ones of equals", "[cuda][top_tokens]") {
  random_source random(base_seed());
  for (const index_t count : counts) {
    const auto rows = nasty_rows(random, count);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      for (const index_t k : {index_t{1}, index_t{2}, count / 2, count - 1, count}) {
        if (k < 1 || k > count) continue;
        CAPTURE(base_seed(), count, i, k);
        REQUIRE(largest(rows[i], k) == first_of(ranked(rows[i]), size(k)));
      }
    }
  }
}

TEST_CASE("a block takes the fewest values that hold a share", "[cuda][top_tokens]") {
  random_source random(base_seed());
  for (const index_t count : counts) {
    const std::vector<float> rows[] = {
        softmax_row(random, count),
        softmax_row(random, count, true),
        filled(count, [&] { return 0.1f; }),
        filled(count, [&] { return static_cast<float>(1 + random.between(0, 300)) * denormal; }),
        filled(count, [&] { return std::exp(random.normal(20)); }),
        filled(count, [&] { return random.one_of({0.0f, -0.0f, 1.0f, 3e38f, denormal}) + 1e-30f; }),
    };
    for (std::size_t i = 0; i < std::size(rows); ++i) {
      for (const double share : {0.0, 1e-9, 0.3, 0.5, 0.95, 0.999999, 1.0}) {
        CAPTURE(base_seed(), count, i, share);
        const std::vector<index_t> tokens = holding(rows[i], share);
        const std::vector<index_t> best = ranked(rows[i]);
        REQUIRE(!tokens.empty());
        REQUIRE(tokens == first_of(best, tokens.size()));
        long double all = 0, held = 0;
        for (const float v : rows[i]) all += static_cast<long double>(v);
        for (std::size_t j = 0; j < tokens.size(); ++j) {
          // Without its last one the set holds too little; the sum that blocks are given is a
          // double.
          if (j + 1 == tokens.size() && j > 0) REQUIRE(held < share * all * (1 + 1e-12L));
          held += static_cast<long double>(rows[i][size(best[j])]);
        }
        REQUIRE(held >= share * all * (1 - 1e-12L));
      }
    }
  }
}

TEST_CASE("a block divides equal values as the CPU does", "[cuda][top_tokens]") {
  random_source random(base_seed());
  for (int repeat = 0; repeat < 40; ++repeat) {
    const index_t count = random.between(1, 400), most = random.between(1, 4);
    const float unit = random.one_of({1.0f, 0.1f, 1e-30f, 7e30f, denormal});
    std::vector<float> values =
        filled(count, [&] { return static_cast<float>(random.between(0, most)) * unit; });
    values[size(random.between(0, count - 1))] = unit;
    const double share = static_cast<double>(random.between(0, 20)) / 20;
    CAPTURE(base_seed(), repeat, count, most, unit, share);

    double sum = 0;
    for (const float v : values) sum += double{v};
    std::vector<float> moved = values;
    cpu_detail::value_limit limit = cpu_detail::limit_by_mass(moved.data(), count, share * sum);
    std::vector<index_t> expected;
    for (index_t t = 0; t < count; ++t) {
      if (limit.selects(values[size(t)])) expected.push_back(t);
    }
    REQUIRE(holding(values, share) == expected);
  }
}

TEST_CASE("a value that a double's sum drowns still counts", "[cuda][top_tokens]") {
  std::vector<float> values(300, denormal);
  values[7] = 3e38f;
  values[9] = 0;
  REQUIRE(holding(values, 0.5) == std::vector<index_t>{7});
  values[7] = 0;
  REQUIRE(holding(values, 1).size() == 298);
  // The double is larger than the sum, which so is never reached: all that is not 0.
  REQUIRE(holding({1, 0x1.8p-53f, 0, 1e-30f}, 1) == std::vector<index_t>{0, 1, 3});
}

TEST_CASE("a block bisects as the CPU does", "[cuda][top_tokens]") {
  random_source random(base_seed());
  for (int repeat = 0; repeat < 30; ++repeat) {
    // Whole numbers of 2^-12, so that sums are exact.
    const index_t count = random.between(1, 400);
    std::vector<float> values(size(count), 0.0f);
    for (int i = 0; i < 4096; ++i) {
      const index_t t = random.between(0, random.between(0, count - 1));
      values[size(repeat % 3 == 0 ? count - 1 - t : t)] += 0x1p-12f;
    }
    const float share = random.one_of({0.0f, 0.25f, 0.5f, 0.95f, 1.0f});
    CAPTURE(base_seed(), repeat, count, share);

    cpu_detail::value_limit limit = cpu_detail::limit_of_bisection(values.data(), count, share);
    std::vector<index_t> expected;
    for (index_t t = 0; t < count; ++t) {
      if (limit.selects(values[size(t)])) expected.push_back(t);
    }
    REQUIRE(taken<cuda_detail::bisection_memory>(
                values, [count, share](auto& block, auto& s, auto row) {
                  return cuda_detail::limit_of_bisection(block, s, row, count, 1, share);
                }) == expected);
  }
}

namespace {

/// Scores [sequence, head, capacity] with room between them, which is NaN as what is past a
/// sequence's end is.
class score_tensor {
 public:
  score_tensor(index_t sequences, index_t heads, index_t capacity, index_t stride)
      : extents_{sequences, heads, capacity},
        stride_(stride),
        values_(size(sequences * heads * (capacity + 3) * stride), not_a_number) {}

  scores_view<> view() {
    const index_t row = (extents_[2] + 3) * stride_;
    return {
        values_.data(), {extents_[0], extents_[1], extents_[2]}, {extents_[1] * row, row, stride_}};
  }
  bool same_as(const score_tensor& other) const {
    return std::equal(values_.begin(), values_.end(), other.values_.begin(),
                      [](float a, float b) { return a == b || (a != a && b != b); });
  }

 private:
  index_t extents_[3];
  index_t stride_;
  std::vector<float> values_;
};

/// Where a decision goes: every second position of rows that have room between them.
class decision {
 public:
  decision(index_t sequences, index_t heads, index_t capacity)
      : positions_(size(sequences * heads * (2 * capacity + 3)), -7),
        counts_(size(sequences * heads), kept_tokens{-7, -7}),
        kept_{{positions_.data(),
               {sequences, heads, capacity},
               {heads * (2 * capacity + 3), 2 * capacity + 3, 2}},
              {counts_.data(), {sequences, heads}}} {}
  decision(const decision&) = delete;
  decision& operator=(const decision&) = delete;

  const kept_positions<>& kept() const { return kept_; }
  /// Also of what is not to be written.
  bool same_as(const decision& other) const {
    return counts_ == other.counts_ && positions_ == other.positions_;
  }
  bool keeps_all(index_t s, index_t h) const {
    return kept_.counts(s, h).count == kept_.counts(s, h).tokens;
  }

 private:
  std::vector<position_t> positions_;
  std::vector<kept_tokens> counts_;
  kept_positions<> kept_;
};

/// A ragged batch and scores of its heads.
struct batch {
  problem shape;
  dense_cache<float> cache;
  index_t heads;  ///< that have scores
  score_tensor scores;

  batch(random_source& random, std::vector<position_t> lengths, index_t group, bool of_q_heads,
        index_t stride, index_t dim = 1, index_t kv_heads = 2)
      : shape(kv_heads, group, dim, 1, std::move(lengths)),
        cache(filled_rows(random)),
        heads(of_q_heads ? shape.q_heads() : shape.keys.kv_heads),
        scores(shape.sequences(), heads, capacity(), stride) {
    for (index_t s = 0; s < shape.sequences(); ++s) {
      for (index_t h = 0; h < heads; ++h) {
        const auto row = softmax_row(random, tokens(s), random.chance(0.5));
        for (index_t t = 0; t < tokens(s); ++t) scores.view()(s, h, t) = row[size(t)];
      }
    }
  }

  auto layer() const { return observe(shape.query_view(), cache.source(), shape.info()); }
  index_t sequences() const { return shape.sequences(); }
  index_t kv_heads() const { return shape.keys.kv_heads; }
  index_t capacity() const { return cache.source().shape().capacity; }
  index_t tokens(index_t s) const { return shape.lengths[size(s)]; }

  /// select(kept) on the CPU, and on(order)(kept) by blocks in different orders: all the same.
  template <class Cpu, class Device>
  void check(const Cpu& on_cpu, const Device& on_device) const {
    decision expected(sequences(), kv_heads(), capacity());
    on_cpu(expected.kept());
    for (const unsigned order : orders) {
      CAPTURE(order);
      decision found(sequences(), kv_heads(), capacity());
      REQUIRE(on_device(emulated_backend{order}, found.kept()) == status::ok);
      REQUIRE(found.same_as(expected));
    }
  }

 private:
  const plain_rows& filled_rows(random_source& random) {
    // Small whole numbers: products and sums are exact in any order, and often equal.
    const auto number = [&] { return static_cast<float>(random.between(-2, 2)); };
    for (auto& rows : shape.keys.values) std::generate(rows.begin(), rows.end(), number);
    std::generate(shape.queries.begin(), shape.queries.end(), number);
    return shape.keys;
  }
};

const std::vector<position_t> ragged = {0, 1, 255, 256, 257, 700, 33};

/// The scratch of either backend.
template <class Take>
class scratch_of {
 public:
  explicit scratch_of(const Take& take) {
    arena count;
    (void)take(count);
    memory_.assign(count.bytes(), std::byte{0xA5});
    arena carve(memory_.data());
    scratch_ = take(carve);
  }
  const auto& operator*() const { return scratch_; }

 private:
  std::vector<std::byte> memory_;
  std::invoke_result_t<Take, arena&> scratch_{};
};

template <class Layer>
auto cpu_scratch(const Layer& layer) {
  return scratch_of(
      [&](arena& from) { return cpu_detail::selection_scratch::carve(from, 1, layer); });
}
template <class Layer>
auto device_scratch(const Layer& layer, const row_cut& cut = {1}) {
  return scratch_of(
      [&](arena& from) { return cuda_detail::selection_scratch::carve(from, layer, cut, cut); });
}

}  // namespace

TEST_CASE("blocks keep every token", "[cuda][top_tokens]") {
  random_source random(base_seed());
  const batch b(random, ragged, 2, false, 1);
  const auto layer = b.layer();
  b.check(
      [&](const auto& kept) {
        for (index_t s = 0; s < b.sequences(); ++s) {
          for (index_t h = 0; h < b.kv_heads(); ++h) {
            cpu_detail::keep_all(kept, s, h, b.tokens(s));
          }
        }
      },
      [&](const auto& exec, const auto& kept) { return cuda_detail::keep_all(exec, layer, kept); });
}

TEST_CASE("blocks keep the CPU's best tokens", "[cuda][top_tokens]") {
  random_source random(base_seed());
  for (const index_t stride : {1, 3}) {
    for (const token_quota quota :
         {token_quota{0, 0}, token_quota{0, 4}, token_quota{1, 0}, token_quota{100, 32},
          token_quota{254, 1}, token_quota{255, 1}, token_quota{1000, 8}, token_quota::all()}) {
      for (const bool with_nan : {false, true}) {
        batch b(random, ragged, 2, false, stride);
        if (with_nan) {
          b.scores.view()(3, 1, 17) = not_a_number;
          b.scores.view()(5, 0, 699) = not_a_number;  // among the recent ones, if there are any
        }
        CAPTURE(base_seed(), stride, quota.ranked, quota.recent, with_nan);
        std::vector<token_quota> quotas(2 * ragged.size(), quota);  // [sequence, kv_head]
        quotas[8] = quotas[9] = {quota.ranked / 2, quota.recent + 1};
        quotas[11].ranked = quota.ranked / 3;
        const auto layer = b.layer();
        const quotas_view<> of_heads(quotas.data(), {b.sequences(), 2});
        const auto cpu = cpu_scratch(layer);
        for (const row_cut& cut : cuts) {
          CAPTURE(cut.parts, cut.part_least);
          const auto device = device_scratch(layer, cut);
          b.check(
              [&](const auto& kept) {
                cpu_detail::top_tokens(cpu_backend{}.threads, of_heads, layer, b.scores.view(),
                                       kept, *cpu);
              },
              [&](const auto& exec, const auto& kept) {
                return cuda_detail::top_tokens(exec, of_heads, layer, b.scores.view(), kept,
                                               *device);
              });
        }
      }
    }
  }
}

namespace {

/// By sorting: what each head keeps of a sequence's quota.
std::vector<index_t> shares(batch& b, index_t s, const token_quota& quota, double floor) {
  const index_t heads = b.kv_heads(), candidates = std::max<index_t>(0, b.tokens(s) - quota.recent);
  if (quota.ranked >= candidates) return std::vector<index_t>(size(heads), quota.ranked);
  std::vector<float> all;
  for (index_t i = 0; i < heads * candidates; ++i) {
    all.push_back(b.scores.view()(s, i / candidates, i % candidates));
  }
  std::vector<index_t> best(size(heads));
  for (const index_t i : first_of(ranked(all), size(heads * quota.ranked))) {
    ++best[size(i / candidates)];
  }
  for (index_t& own : best) {
    own = static_cast<index_t>(std::nearbyint(floor * static_cast<double>(quota.ranked) +
                                              (1 - floor) * static_cast<double>(own)));
  }
  return best;
}

/// Checks what the CPU and blocks share out. The second head of the sequence `spoilt` has NaN.
void check_shares(batch& b, const std::vector<token_quota>& quotas, double floor,
                  const row_cut& cut, index_t spoilt = -1) {
  const auto layer = b.layer();
  const index_t heads = b.kv_heads();
  const auto check = [&](const auto& share) {
    std::vector<token_quota> shared(size(b.sequences() * heads));
    share(shared.data());
    for (index_t s = 0; s < b.sequences(); ++s) {
      const token_quota quota = quotas[size(s)];
      const index_t candidates = b.tokens(s) - quota.recent;
      if (quota.ranked < candidates && s == spoilt) {
        REQUIRE(shared[size(s * heads + 1)].ranked < candidates);
        continue;
      }
      const std::vector<index_t> expected = shares(b, s, quota, floor);
      for (index_t h = 0; h < heads; ++h) {
        CAPTURE(s, h, quota.ranked, quota.recent, floor);
        REQUIRE(shared[size(s * heads + h)].ranked == expected[size(h)]);
        REQUIRE(shared[size(s * heads + h)].recent == quota.recent);
      }
    }
  };
  const auto cpu = scratch_of([&](arena& from) {
    return ops<cpu_backend<>>::carve_sharing_scratch(from, cpu_backend{}, layer);
  });
  check([&](token_quota* shared) {
    cpu_detail::share_quotas(cpu_backend{}.threads, floor, quotas.data(), layer, b.scores.view(),
                             shared, *cpu);
  });
  for (const unsigned order : orders) {
    CAPTURE(order, cut.parts);
    const auto device = scratch_of(
        [&](arena& from) { return cuda_detail::carve_sharing_scratch(from, layer, cut); });
    check([&](token_quota* shared) {
      REQUIRE(cuda_detail::share_quotas(emulated_backend{order}, floor, quotas.data(), layer,
                                        b.scores.view(), shared, *device) == status::ok);
    });
  }
}

}  // namespace

TEST_CASE("heads share by the best scores of all", "[cuda][top_tokens]") {
  random_source random(base_seed());
  for (const token_quota quota : {token_quota{0, 4}, token_quota{1, 0}, token_quota{100, 32},
                                  token_quota{254, 1}, token_quota{256, 1}, token_quota::all()}) {
    for (const bool with_nan : {false, true}) {
      batch b(random, ragged, 1, false, random.one_of<index_t>({1, 3}), 1, 3);
      for (index_t h = 0; h < 3; ++h) {
        const auto rows = nasty_rows(random, b.tokens(5));
        const auto& row = rows[size(random.between(0, static_cast<index_t>(rows.size()) - 1))];
        for (index_t t = 0; t < b.tokens(5); ++t) b.scores.view()(5, h, t) = row[size(t)];
      }
      for (index_t t = 0; t < b.tokens(4) && with_nan;
           ++t) {  // all of this head are among the best
        b.scores.view()(4, 1, t) = t == 17 ? random.one_of({not_a_number, -not_a_number}) : 2;
      }
      std::vector<token_quota> quotas(ragged.size(), quota);
      quotas[3] = {quota.ranked / 2, quota.recent + 1};
      CAPTURE(base_seed(), with_nan);
      check_shares(b, quotas, random.one_of({0.0, 0.2, 0.5, 1.0}),
                   random.one_of({cuts[0], cuts[1], cuts[2]}), with_nan ? 4 : -1);
    }
  }
  // More parts of all heads than a block has threads.
  for (const float tie : {0.0f, 0.5f}) {
    batch many(random, {400, 90}, 1, false, 1, 1, 40);
    for (index_t h = 0; h < 40 && tie > 0; ++h) {
      for (index_t t = 0; t < 400; ++t) many.scores.view()(0, h, t) = tie;
    }
    check_shares(many, {{350, 10}, {3, 1}}, 0, {8, 16});
  }
}

TEST_CASE("heads that share are cut in few parts", "[cuda][top_tokens]") {
  random_source random(base_seed());
  const auto parts_of = [&](index_t kv_heads, position_t tokens) {
    const batch b(random, {tokens}, 1, false, 1, 1, kv_heads);
    arena count;
    return cuda_detail::carve_sharing_scratch(count, b.layer()).rows.cut.parts;
  };
  CHECK(parts_of(1, 12000) == 6);
  CHECK(parts_of(8, 12000) == 4);
  CHECK(parts_of(33, 12000) == 1);
  CHECK(parts_of(8, 100) == 1);
  batch b(random, {12000, 9000}, 1, false, 1);
  check_shares(b, {{1000, 50}, {8000, 8}}, 0.2, {4});
}

TEST_CASE("blocks keep the CPU's share of attention", "[cuda][top_tokens]") {
  random_source random(base_seed());
  for (const index_t group : {1, 3}) {
    for (const double share : {0.0, 0.5, 0.95, 0.999}) {
      for (const float special : {0.5f, not_a_number, infinity}) {
        batch b(random, ragged, group, true, random.one_of<index_t>({1, 2}));
        CAPTURE(base_seed(), group, share, special);
        if (special != 0.5f) b.scores.view()(2, group - 1, 99) = special;
        for (index_t t = 0; t < 256; ++t) b.scores.view()(3, 0, t) = 0;
        const auto layer = b.layer();
        const auto cpu = cpu_scratch(layer);
        for (const row_cut& cut : {cuts[0], random.one_of({cuts[1], cuts[2]})}) {
          CAPTURE(cut.parts, cut.part_least);
          const auto device = device_scratch(layer, cut);
          b.check(
              [&](const auto& kept) {
                cpu_detail::top_mass(cpu_backend{}.threads, share, false, layer, b.scores.view(),
                                     kept, *cpu);
              },
              [&](const auto& exec, const auto& kept) {
                return cuda_detail::top_mass(exec, share, false, layer, b.scores.view(), kept,
                                             *device);
              });
        }
      }
    }
  }
}

TEST_CASE("parts of rows make up the whole", "[cuda][top_tokens]") {
  for (const row_cut& cut : {row_cut{1}, row_cut{3, 256}, row_cut{256, 1}, row_cut{5, 51},
                             row_cut::of(8, 131072), row_cut::of(100, 40000)}) {
    for (const index_t count : {0, 1, 2, 50, 51, 52, 255, 256, 257, 768, 769, 6000, 131072}) {
      CAPTURE(cut.parts, cut.part_least, count);
      index_t next = 0, used = 0;
      for (index_t p = 0; p < cut.parts; ++p) {
        const token_range part = cut.part(p, count);
        REQUIRE(part.begin == next);
        used += part.end > part.begin ? 1 : 0;
        next = part.end;
      }
      REQUIRE(next == count);
      REQUIRE(cut.used(count) == std::max<index_t>(1, used));
    }
  }
  // Short rows and many of them are not cut.
  REQUIRE(row_cut::of(8, 8192).parts == 1);
  REQUIRE(row_cut::of(8, 131072).parts == 32);
  REQUIRE(row_cut::of(128, 131072).parts == 4);
  REQUIRE(row_cut::of(512, 1 << 20).parts == 1);
  REQUIRE(row_cut::of(0, 0).parts == 1);
}

namespace {

/// select(exec, layer, kept, scratch) is the same over a grid, by blocks in different orders, as by
/// a block for each row.
template <class Select>
void same_on_grid(const batch& b, const row_cut& cut, const Select& select) {
  const auto layer = b.layer();
  const auto whole = device_scratch(layer);
  decision expected(b.sequences(), b.kv_heads(), b.capacity());
  REQUIRE(select(emulated_backend{}, layer, expected.kept(), *whole) == status::ok);
  for (const unsigned order : orders) {
    CAPTURE(order);
    const auto parts = device_scratch(layer, cut);
    decision found(b.sequences(), b.kv_heads(), b.capacity());
    REQUIRE(select(emulated_backend{order}, layer, found.kept(), *parts) == status::ok);
    REQUIRE(found.same_as(expected));
  }
}

}  // namespace

TEST_CASE("a grid takes what one block takes", "[cuda][top_tokens]") {
  random_source random(base_seed());
  // Parts end at 64, 128 and 192; past 256 tokens at 128, 256 and 384.
  constexpr row_cut cut{4, 64};
  for (const position_t count : {1, 63, 64, 65, 128, 256, 257, 500}) {
    batch b(random, {count, 3}, 1, false, random.one_of<index_t>({1, 3}));
    const auto rows = nasty_rows(random, count);
    for (std::size_t i = 0; i + 1 < rows.size(); ++i) {
      for (index_t t = 0; t < count; ++t) {
        b.scores.view()(0, 0, t) = rows[i][size(t)];
        b.scores.view()(0, 1, t) = rows[i + 1][size(t)];
      }
      for (const index_t k : {index_t{0}, index_t{1}, index_t{count} / 2, index_t{count} - 1}) {
        CAPTURE(base_seed(), count, i, k);
        const token_quota quotas[] = {{k, 0}, {1, 1}};
        const auto select = [&](const auto& exec, const auto& layer, const auto& kept,
                                const auto& scratch) {
          return cuda_detail::top_tokens(exec, detail::quotas_by_sequence(quotas, layer), layer,
                                         b.scores.view(), kept, scratch);
        };
        same_on_grid(b, cut, select);
        if (k != index_t{count} / 2) continue;
        float& some = b.scores.view()(0, 1, random.between(0, count - 1));
        const float was = std::exchange(some, not_a_number);
        same_on_grid(b, cut, select);
        some = was;
      }
      for (index_t h = 0; h < 2; ++h) {
        for (index_t t = 0; t < count; ++t) {
          float& score = b.scores.view()(0, h, t);
          score = std::min(std::abs(score), 1e30f);
        }
      }
      const double share = random.one_of({0.0, 1e-9, 0.5, 0.95, 1.0});
      CAPTURE(base_seed(), count, i, share);
      same_on_grid(
          b, cut, [&](const auto& exec, const auto& layer, const auto& kept, const auto& scratch) {
            return cuda_detail::top_mass(exec, share, false, layer, b.scores.view(), kept, scratch);
          });
    }
  }
}

TEST_CASE("rows that are long enough go over a grid", "[cuda][top_tokens]") {
  random_source random(base_seed());
  const batch b(random, {12000, 1, 9000, 2048}, 1, false, 1);
  const row_cut cut = row_cut::of(4 * 2, 12000);
  REQUIRE(cut.parts == 6);
  arena count;
  const auto taken = cuda_detail::selection_scratch::carve(count, b.layer());
  REQUIRE((taken.kv_rows.parts == 6 && taken.q_rows.parts == 6));
  score_tensor scores = b.scores;
  const token_quota quotas[] = {{1000, 50}, {1, 0}, {3000, 5000}, {2047, 0}};
  same_on_grid(b, cut,
               [&](const auto& exec, const auto& layer, const auto& kept, const auto& work) {
                 return cuda_detail::top_tokens(exec, detail::quotas_by_sequence(quotas, layer),
                                                layer, scores.view(), kept, work);
               });
  // Values that a double's sum rounds away are taken, or not, by what it is to the last bit.
  for (index_t h = 0; h < 2; ++h) {
    for (index_t t = 0; t < 12000; ++t) scores.view()(0, h, t) = std::exp(random.normal(15));
  }
  for (const row_cut& some : {cut, row_cut{2}}) {
    for (const double share : {0.9, 1.0}) {
      CAPTURE(base_seed(), some.parts, share);
      same_on_grid(
          b, some, [&](const auto& exec, const auto& layer, const auto& kept, const auto& work) {
            return cuda_detail::top_mass(exec, share, false, layer, scores.view(), kept, work);
          });
    }
  }
}

TEST_CASE("blocks keep the set of Twilight's published kernel", "[cuda][top_tokens]") {
  random_source random(base_seed());
  for (const double share : {0.25, 0.5, 0.9375}) {
    batch b(random, ragged, 2, true, 1);
    for (index_t s = 0; s < b.sequences(); ++s) {
      for (index_t h = 0; h < b.heads; ++h) {
        // 1024 parts of 2^-8, so that sums are exact and a share of them is not at a limit.
        for (index_t t = 0; t < b.tokens(s); ++t) b.scores.view()(s, h, t) = 0;
        for (int i = 0; i < 1024 && b.tokens(s) > 0; ++i) {
          b.scores.view()(s, h, random.between(0, b.tokens(s) - 1)) += 0x1p-8f;
        }
      }
    }
    CAPTURE(base_seed(), share);
    const auto layer = b.layer();
    const auto cpu = cpu_scratch(layer);
    const auto device = device_scratch(layer, {3, 256});
    b.check(
        [&](const auto& kept) {
          cpu_detail::top_mass(cpu_backend{}.threads, share, true, layer, b.scores.view(), kept,
                               *cpu);
        },
        [&](const auto& exec, const auto& kept) {
          return cuda_detail::top_mass(exec, share, true, layer, b.scores.view(), kept, *device);
        });
  }
}

namespace {

struct ranking {
  std::vector<position_t> order;
  std::vector<double> norms;
  ranking(index_t sequences, index_t kv_heads, index_t capacity)
      : order(size(sequences * kv_heads * capacity), -7), norms(size(sequences * capacity), -7) {}
};

}  // namespace

TEST_CASE("blocks rank tokens as the CPU does", "[cuda][ranked_scan]") {
  random_source random(base_seed());
  for (const index_t recent : {0, 8, 1000}) {
    for (const bool with_nan : {false, true}) {
      batch b(random, ragged, 3, false, random.one_of<index_t>({1, 2}));
      const batch weighed(random, ragged, 3, true, random.one_of<index_t>({1, 3}));
      b.scores.view()(2, 0, 5) = -0.0f;
      b.scores.view()(2, 0, 6) = 0.0f;
      b.scores.view()(2, 0, 7) = -1.0f;
      if (with_nan) b.scores.view()(4, 1, 3) = not_a_number;
      auto weights_memory = weighed.scores;
      const scores_view<> scores = b.scores.view(), weights = weights_memory.view();
      if (with_nan) weights(3, 5, 0) = not_a_number;
      CAPTURE(base_seed(), recent, with_nan);

      const auto layer = b.layer();
      ranking expected(b.sequences(), b.kv_heads(), b.capacity());
      cpu_detail::rank_tokens(cpu_backend{}.threads, recent, layer, scores, weights,
                              expected.order.data(), expected.norms.data());
      std::vector<double> first;
      for (const unsigned order : orders) {
        const emulated_backend exec{order};
        const auto scratch = scratch_of(
            [&](arena& from) { return cuda_detail::ranking_scratch::carve(from, exec, layer); });
        ranking found(b.sequences(), b.kv_heads(), b.capacity());
        REQUIRE(cuda_detail::rank_tokens(exec, recent, layer, scores, weights, found.order.data(),
                                         found.norms.data(), *scratch) == status::ok);
        if (order == orders[0]) first = found.norms;
        REQUIRE(std::memcmp(first.data(), found.norms.data(), first.size() * sizeof first[0]) == 0);
        REQUIRE(found.order == expected.order);
        for (index_t s = 0; s < b.sequences(); ++s) {
          const double* curve = found.norms.data() + s * b.capacity();
          const double* wanted = expected.norms.data() + s * b.capacity();
          REQUIRE(std::isnan(curve[0]) == std::isnan(wanted[0]));
          for (index_t i = 0; i < b.capacity() && !std::isnan(wanted[0]); ++i) {
            REQUIRE(std::abs(curve[i] - wanted[i]) <= 1e-13 * wanted[i]);
          }
        }

        // Both stop on one curve, of which one sequence's falls in steps to losses that are just
        // allowed.
        for (index_t i = 0; i < b.capacity(); ++i) {
          found.norms[size(5 * b.capacity() + i)] = std::ldexp(1.0, -static_cast<int>(i / 100));
        }
        for (const double threshold : {0.0, 0.01, 0.5, 1.0}) {
          CAPTURE(threshold, order);
          auto cpu_order = expected.order;
          decision by_cpu(b.sequences(), b.kv_heads(), b.capacity());
          cpu_detail::stop_ranked(cpu_backend{}.threads, threshold, recent, layer,
                                  found.norms.data(), cpu_order.data(), by_cpu.kept());
          decision by_blocks(b.sequences(), b.kv_heads(), b.capacity());
          REQUIRE(cuda_detail::stop_ranked(exec, threshold, recent, layer, found.norms.data(),
                                           found.order.data(), by_blocks.kept(),
                                           *scratch) == status::ok);
          REQUIRE(by_blocks.same_as(by_cpu));
        }
      }
    }
  }
}

TEST_CASE("blocks leave the CPU's pages", "[cuda][estimate]") {
  random_source random(base_seed());
  for (const index_t page_tokens : {1, 16, 60, 1000}) {
    for (const index_t tokens : {1, 16, 100, 250}) {
      batch b(random, ragged, 3, true, random.one_of<index_t>({1, 2}), random.one_of({1, 5, 40}));
      b.shape.sliding_window = random.one_of<count_t>({0, 0, 50});
      CAPTURE(base_seed(), page_tokens, tokens, b.shape.sliding_window, b.shape.head_dim);
      estimates index(b.cache.source(), ragged, page_tokens);
      REQUIRE(refreekv::bound_pages(cpu_backend{}, b.cache.source(), index.page_bounds()) ==
              status::ok);
      index.page_bounds().bounds(2, 1, 254 / page_tokens, 0, 0) = not_a_number;
      index.page_bounds().bounds(2, 1, 254 / page_tokens, 1, 0) = not_a_number;

      const auto layer = with_pages(b.layer(), index.page_bounds());
      REQUIRE(layer.invalid() == nullptr);
      const auto cpu = cpu_scratch(layer);
      score_tensor expected = b.scores;
      cpu_detail::select_pages(cpu_backend{}.threads, layer.pages, tokens, detail::plain(layer),
                               expected.view(), *cpu);
      for (const unsigned order : orders) {
        const auto device = device_scratch(layer);
        score_tensor found = b.scores;
        REQUIRE(cuda_detail::select_pages(emulated_backend{order}, layer.pages, tokens,
                                          detail::plain(layer), found.view(),
                                          *device) == status::ok);
        REQUIRE(found.same_as(expected));
      }
    }
  }
}

namespace {

/// Makes 4-bit keys and page bounds by either backend, all of them and then those from `from` on.
template <class T>
void check_estimates(random_source& random, index_t dim) {
  const std::vector<position_t> lengths = {0, 1, 70, 257, 300};
  plain_rows rows(2, dim, lengths);
  for (auto& sequence : rows.values) {
    for (float& x : sequence) x = random.normal();
  }
  rows.at(3, 0, 5, dim - 1) = not_a_number;
  rows.at(3, 0, 6, 0) = infinity;
  rows.at(3, 1, 7, 0) = -infinity;
  for (index_t d = 0; d < dim; ++d) rows.at(3, 1, 8, d) = 0.25f;
  const std::vector<position_t> from = {0, 1, 63, 9, 299};
  for_each_layout<T>(rows, [&](const char* name, const auto& cache) {
    const auto keys = cache.source();
    const index_t page_tokens = random.one_of<index_t>({1, 16, 19, 300});
    CAPTURE(base_seed(), name, dim, page_tokens);
    for (const lengths_view<>& first :
         {lengths_view<>{}, lengths_view<>(from.data(), {static_cast<index_t>(from.size())})}) {
      estimates expected(keys, lengths, page_tokens);
      cpu_detail::quantise(cpu_backend{}.threads, keys, first, expected.keys());
      cpu_detail::bound_pages(cpu_backend{}.threads, keys, first, expected.page_bounds());
      for (const unsigned order : orders) {
        const emulated_backend exec{order};
        estimates found(keys, lengths, page_tokens);
        REQUIRE(cuda_detail::quantise(exec, keys, first, found.keys()) == status::ok);
        REQUIRE(cuda_detail::bound_pages(exec, keys, first, found.page_bounds()) == status::ok);
        REQUIRE(found.same_as(expected));
      }
    }
  });
}

}  // namespace

TEST_CASE("blocks make the CPU's 4-bit keys and page bounds", "[cuda][estimate]") {
  random_source random(base_seed());
  for (const index_t dim : {1, 7, 64, 80}) {
    check_estimates<float>(random, dim);
    check_estimates<bf16_bits>(random, dim);
    check_estimates<f16_bits>(random, dim);
  }
}

TEST_CASE("blocks have nothing to do for an empty batch", "[cuda][top_tokens]") {
  random_source random(base_seed());
  for (const std::vector<position_t>& lengths : {std::vector<position_t>{}, {0}}) {
    batch b(random, lengths, 1, true, 1);
    const auto layer = b.layer();
    const emulated_backend exec;
    const std::vector<token_quota> quotas(lengths.size());
    const scores_view<> scores = b.scores.view();
    for (const row_cut& cut : cuts) {
      const auto scratch = device_scratch(layer, cut);
      decision found(b.sequences(), b.kv_heads(), b.capacity());
      REQUIRE(cuda_detail::top_tokens(exec, detail::quotas_by_sequence(quotas.data(), layer), layer,
                                      scores, found.kept(), *scratch) == status::ok);
      REQUIRE(cuda_detail::top_mass(exec, 0.9, false, layer, scores, found.kept(), *scratch) ==
              status::ok);
      for (std::size_t s = 0; s < lengths.size(); ++s) {
        REQUIRE(found.kept().counts(s, 1) == kept_tokens{0, 0});
      }
    }
  }
}
