// SPDX-License-Identifier: Apache-2.0
// What select, compact and prune do besides what every policy has in common (contract_test.cpp).
#include <sys/mman.h>

#include "ranks.hpp"
#include "reference.hpp"

using namespace refreekv;

namespace {

problem random_problem(unsigned seed, std::vector<position_t> lengths = {300, 5, 0, 77, 4, 1}) {
  random_source random(seed);
  problem p(2, 3, 16, 3, std::move(lengths));
  fill(p, random);
  return p;
}

auto ok = [](const selection& s) {
  REQUIRE(s.status == status::ok);
  return s;
};

/// As a dense cache's rows decide, and what stays is there after compaction.
template <class Cache>
void check_alone(const problem& p, const Cache& cache) {
  const auto source = cache.source();
  static_assert(kv_source<decltype(source)>);
  const policy::refreekv policy{.threshold = 0.1, .window = 3};
  const dense_cache<float> dense_keys(p.keys);
  const selection expected =
      ok(run_select(policy, divided<1>(), observe(p.query_view(), dense_keys.source(), p.info())));
  const selection got =
      ok(run_select(policy, divided<1>(), observe(p.query_view(), source, p.info())));
  CHECK(got.kept == expected.kept);
  const view<const kept_range, 2> cuts(got.kept.data(), {p.sequences(), 1});
  REQUIRE(compact(divided<1>(), cuts, compaction::suffix_down, source) == status::ok);
  CHECK(cache.untouched());
  CHECK(source.run_at(0, 1, got.at(0).sinks).data[0] == p.keys.at(0, 1, got.at(0).cut, 0));
}

}  // namespace

TEST_CASE("compaction is a gather of the kept rows, bit for bit", "[contract]") {
  random_source random(base_seed() + 5);
  const problem p = random_problem(base_seed() + 5);
  plain_rows values(2, 24, p.lengths);
  for (auto& sequence : values.values) {
    for (float& v : sequence) v = random.normal();
  }
  const auto how = GENERATE(compaction::sinks_up, compaction::suffix_down);
  const std::size_t number = GENERATE(range(std::size_t{0}, layout_kinds));
  const policy::refreekv of_layer{}, of_head{.threshold = 0.1, .scope = cut_scope::kv_head};
  for (const auto& policy : {of_layer, of_head}) {
    const auto exec = divided<1>();
    with_layout<Eigen::bfloat16>(number, p.keys, [&](const char* layout, const auto& keys) {
      INFO(layout);
      // The values in the same layout, of another type.
      with_layout<float>(number, values, [&](const char*, const auto& value_cache) {
        const auto layer = observe(p.query_view(), keys.source(), p.info());
        std::vector<std::byte> scratch(workspace_size(policy, exec, layer));
        std::vector<kept_range> kept(size(p.sequences() * policy.groups(layer)));
        const view<kept_range, 2> cuts(kept.data(), {p.sequences(), policy.groups(layer)});
        REQUIRE(prune(policy, exec, layer, cuts, scratch, how, value_cache.source()) == status::ok);
        const auto check = [&](const auto& cache, const plain_rows& rows) {
          using element = typename std::decay_t<decltype(cache.source())>::element_type;
          CHECK(cache.untouched());
          const auto source = cache.source();
          bool equal = true;
          for (index_t s = 0; s < rows.sequences(); ++s) {
            for (index_t h = 0; h < rows.kv_heads; ++h) {
              const kept_range& k = cuts(s, cuts.extent(1) == 1 ? 0 : h);
              index_t slot = first_slot(k, how);
              for (index_t t = 0; t < k.tokens; ++t) {
                if (!k.keeps(t)) continue;
                const auto run = source.run_at(s, h, slot++);
                for (index_t d = 0; d < rows.head_dim; ++d) {
                  equal = equal && to_float(run.data[d * run.dim_stride]) ==
                                       to_float(to_element<element>(rows.at(s, h, t, d)));
                }
              }
              CHECK(slot == first_slot(k, how) + k.length());
            }
          }
          CHECK(equal);
        };
        check(keys, p.keys);
        check(value_cache, values);
      });
    });
  }
}

TEST_CASE("each type of source selects and compacts by itself", "[contract]") {
  const problem p = random_problem(base_seed() + 12);
  check_alone(p, dense_cache<float>(p.keys, axis_order::token_head_dim));
  check_alone(p, paged_cache<float>(p.keys, 16));
  check_alone(p, paged_cache<float, std::int64_t>(p.keys, 16));
  check_alone(p, segmented_cache<float>(p.keys));
}

TEST_CASE("compaction gathers positions in every layout, bit for bit", "[contract]") {
  random_source random(base_seed() + 11);
  const std::vector<position_t> lengths{300, 5, 0, 77, 1};
  plain_rows rows(2, 24, lengths);
  for (auto& sequence : rows.values) {
    for (float& v : sequence) v = random.normal();
  }
  const auto how = GENERATE(compaction::sinks_up, compaction::suffix_down);
  const double share = GENERATE(0.0, 0.03, 0.5, 0.97, 1.0);
  std::vector<position_t> positions(5 * 2 * 300);
  std::vector<kept_tokens> counts(5 * 2);
  const kept_positions<> kept{{positions.data(), {5, 2, 300}}, {counts.data(), {5, 2}}};
  for (index_t s = 0; s < 5; ++s) {
    for (index_t h = 0; h < 2; ++h) {
      kept.counts(s, h) = {0, lengths[size(s)]};
      for (position_t t = 0; t < lengths[size(s)]; ++t) {
        if (random.chance(share)) kept.positions(s, h, kept.counts(s, h).count++) = t;
      }
    }
  }
  for_each_layout<Eigen::bfloat16>(rows, [&](const char* layout, const auto& cache) {
    CAPTURE(layout, share);
    const auto source = cache.source();
    REQUIRE(compact(divided<2>(), kept, how, source) == status::ok);
    CHECK(cache.untouched());
    bool equal = true;
    for (index_t s = 0; s < 5; ++s) {
      for (index_t h = 0; h < 2; ++h) {
        const kept_tokens& k = kept.counts(s, h);
        for (index_t i = 0; i < k.count; ++i) {
          const auto run = source.run_at(s, h, first_slot(k, how) + i);
          for (index_t d = 0; d < 24; ++d) {
            equal = equal && to_float(run.data[d * run.dim_stride]) ==
                                 to_float(to_element<Eigen::bfloat16>(
                                     rows.at(s, h, kept.positions(s, h, i), d)));
          }
        }
      }
    }
    CHECK(equal);
  });
}

TEST_CASE("compact refuses positions that are not ascending ones of the cache", "[contract]") {
  const plain_rows rows(1, 4, {10});
  const dense_cache<float> cache(rows);
  const auto run = [&](std::vector<position_t> positions, kept_tokens count) {
    positions.resize(10);
    const kept_positions<> kept{{positions.data(), {1, 1, 10}}, {&count, {1, 1}}};
    const auto how = compaction::suffix_down;
    const status s = compact(divided<1>(), kept, how, cache.source());
    CHECK((why_invalid(kept, how, cache.source()) == nullptr) == (s == status::ok));
    return s;
  };
  CHECK(run({0, 3, 9}, {3, 10}) == status::ok);
  CHECK(run({}, {0, 10}) == status::ok);
  CHECK(run({0, 3, 10}, {3, 10}) == status::invalid_argument);
  CHECK(run({-1, 3, 9}, {3, 10}) == status::invalid_argument);
  CHECK(run({3, 3, 9}, {3, 10}) == status::invalid_argument);
  CHECK(run({4, 3, 9}, {3, 10}) == status::invalid_argument);
  CHECK(run({0, 3, 9}, {3, 9}) == status::invalid_argument);
  CHECK(run({0, 3, 9}, {-1, 10}) == status::invalid_argument);
  CHECK(run({0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, {11, 10}) == status::invalid_argument);
}

TEST_CASE("overlapping moves of compaction are right for every cut", "[contract]") {
  const auto how = GENERATE(compaction::sinks_up, compaction::suffix_down);
  for (position_t n = 0; n <= 9; ++n) {
    for (position_t sinks = 0; sinks <= n; ++sinks) {
      for (position_t cut = sinks; cut <= n; ++cut) {
        plain_rows rows(1, 1, {n});
        for (position_t t = 0; t < n; ++t) rows.at(0, 0, t, 0) = static_cast<float>(t);
        const kept_range kept{sinks, cut, n, 0, 0};
        for_each_layout<float>(rows, [&](const char* layout, const auto& cache) {
          CAPTURE(layout, n, sinks, cut);
          const auto source = cache.source();
          REQUIRE(compact(divided<1>(), view<const kept_range, 2>(&kept, {1, 1}), how, source) ==
                  status::ok);
          index_t slot = first_slot(kept, how);
          for (position_t t = 0; t < n; ++t) {
            if (kept.keeps(t)) REQUIRE(*source.run_at(0, 0, slot++).data == static_cast<float>(t));
          }
          REQUIRE(cache.untouched());
        });
      }
    }
  }
}

TEST_CASE("compact refuses ranges that are not of the cache", "[contract]") {
  const plain_rows rows(2, 4, {10});
  const dense_cache<float> cache(rows);
  const auto run = [&](kept_range kept, index_t groups = 1) {
    const std::vector<kept_range> all(size(groups), kept);
    const view<const kept_range, 2> ranges(all.data(), {1, groups});
    const auto how = compaction::sinks_up;
    const status s = compact(divided<1>(), ranges, how, cache.source());
    CHECK((why_invalid(ranges, how, cache.source()) == nullptr) == (s == status::ok));
    return s;
  };
  CHECK(run({4, 6, 10, 0, 0}) == status::ok);
  CHECK(run({4, 6, 10, 0, 0}, 2) == status::ok);
  CHECK(run({4, 6, 10, 0, 0}, 3) == status::invalid_argument);
  CHECK(run({4, 6, 9, 0, 0}) == status::invalid_argument);
  CHECK(run({4, 3, 10, 0, 0}) == status::invalid_argument);
  CHECK(run({-1, 3, 10, 0, 0}) == status::invalid_argument);
  CHECK(run({4, 11, 10, 0, 0}) == status::invalid_argument);
}

TEST_CASE("the cut of heads spread over ranks is that of one rank", "[contract]") {
  constexpr index_t ranks = 2;
  for (unsigned seed = base_seed(); seed < base_seed() + 20; ++seed) {
    INFO("REFREEKV_SEED=" << seed);
    const problem p = random_problem(seed, {700, 300});
    const dense_cache<float> keys(p.keys);
    for (const row_average average : {row_average::mean, row_average::frobenius}) {
      const policy::refreekv policy{.window = 3, .average = average};
      const selection expected =
          ok(run_select(policy, divided<1>(), observe(p.query_view(), keys.source(), p.info())));
      rank_group group(ranks);
      std::vector<selection> got(ranks);
      run_ranks(ranks, [&](index_t rank) {
        const problem part = heads_of(p, rank, rank + 1);
        const dense_cache<float> own(part.keys);
        const auto layer = observe(part.query_view(), own.source(), part.info());
        got[size(rank)] = select_on_rank(policy, divided<1>(), layer, head_link{&group, rank});
      });
      for (const selection& rank : got) {
        REQUIRE(rank.status == status::ok);
        for (index_t s = 0; s < p.sequences(); ++s) {
          CHECK(rank.at(s).cut == expected.at(s).cut);
          CHECK(rank.at(s).loss == Approx(expected.at(s).loss).margin(1e-7));
        }
      }
    }
  }
}

TEST_CASE("a reduction's error ends select", "[contract]") {
  const problem p = random_problem(base_seed(), {100});
  const dense_cache<float> keys(p.keys);
  int calls = 0;
  const auto broken = [&](double*, index_t) {
    ++calls;
    return status::device_error;
  };
  CHECK(run_select(policy::refreekv{}, divided<1>(),
                   observe(p.query_view(), keys.source(), p.info()), 0, broken)
            .status == status::device_error);
  CHECK(calls == 1);
}

#if !defined(__CUDACC__)  // no device reaches what a host maps: see cuda_backend_test.cu
TEST_CASE("offsets past 2^31 elements are right", "[contract]") {
  // Heads lie 3 * 2^30 elements apart in address space of which hardly any page is ever touched.
  const problem p = random_problem(base_seed() + 6, {300});
  constexpr index_t head_stride = index_t{3} << 30;
  const std::size_t bytes = 2 * size(head_stride) * sizeof(bf16_bits);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  REQUIRE(memory != MAP_FAILED);
  const view<bf16_bits, 4> far(static_cast<bf16_bits*>(memory), {1, 2, 300, 16},
                               {2 * head_stride, head_stride, 16, 1});
  for (index_t h = 0; h < 2; ++h) {
    for (index_t t = 0; t < 300; ++t) {
      for (index_t d = 0; d < 16; ++d) {
        far(0, h, t, d) = to_element<bf16_bits>(p.keys.at(0, h, t, d));
      }
    }
  }
  const dense_cache<bf16_bits> near(p.keys);
  const policy::refreekv policy{.scope = cut_scope::kv_head};
  const selection expected =
      ok(run_select(policy, divided<1>(), observe(p.query_view(), near.source(), p.info())));
  const selection got =
      ok(run_select(policy, divided<1>(), observe(p.query_view(), dense(far), p.info())));
  for (index_t g = 0; g < 2; ++g) CHECK(got.at(0, g) == expected.at(0, g));

  // Pages of 2^15 elements, the last of 2^17 pages: the vLLM case of one million cached tokens.
  const view<bf16_bits, 4> pool(static_cast<bf16_bits*>(memory), {1 << 17, 2, 16, 16},
                                {1 << 15, 16 * 16, 16, 1});
  std::vector<std::int32_t> ids;
  for (int page = 0; page < 19; ++page) ids.push_back((1 << 17) - 1 - page);
  const position_t length = 300;
  const paged keys(pool, page_table<std::int32_t>::padded({ids.data(), {1, 19}}, {&length, {1}}));
  for (index_t h = 0; h < 2; ++h) {
    for (index_t t = 0; t < 300; ++t) {
      for (index_t d = 0; d < 16; ++d) {
        keys.run_at(0, h, t).data[d] = to_element<bf16_bits>(p.keys.at(0, h, t, d));
      }
    }
  }
  const selection in_pages =
      ok(run_select(policy, divided<1>(), observe(p.query_view(), keys, p.info())));
  for (index_t g = 0; g < 2; ++g) CHECK(in_pages.at(0, g) == expected.at(0, g));
  munmap(memory, bytes);
}
#endif

TEST_CASE("prune refuses values of other sequences before anything is written", "[contract]") {
  const problem p = random_problem(base_seed() + 10, {300, 20});
  const dense_cache<float> keys(p.keys);
  const plain_rows same(2, 8, {300, 20}), shorter(2, 8, {299, 20}), fewer(2, 8, {300}),
      other_heads(3, 8, {300, 20});
  const auto layer = observe(p.query_view(), keys.source(), p.info());
  const policy::refreekv policy;
  std::vector<std::byte> scratch(workspace_size(policy, divided<1>(), layer));
  const auto run = [&](const plain_rows& rows) {
    std::vector<kept_range> kept(2, kept_range{-7, -7, -7, 0, 0});
    const dense_cache<float> values(rows);
    const view<kept_range, 2> ranges(kept.data(), {2, 1});
    const status s = prune(policy, divided<1>(), layer, ranges, scratch, compaction::suffix_down,
                           values.source());
    const char* why = why_invalid(policy, layer, ranges, values.source());
    CHECK((kept[0].cut == -7) == (s != status::ok));
    CHECK((why == nullptr) == (s == status::ok));
    return std::string(why == nullptr ? "" : why);
  };
  CHECK(run(shorter) == "values and keys differ in tokens");
  CHECK(run(fewer) == "values and keys differ in sequences");
  CHECK(run(other_heads) == "values and keys differ in kv_heads");
  CHECK(run(same) == "");
}

TEST_CASE("sizes that no memory holds are refused, not wrapped", "[contract]") {
  // Broadcast views: a few elements that claim to be a great many.
  float one = 1;
  const auto small = [&](index_t heads, index_t window, index_t dim, index_t tokens,
                         index_t kv_heads = 0) {
    if (kv_heads == 0) kv_heads = heads;
    const dense keys(view(&one, {1, kv_heads, tokens, dim}, {0, 0, 0, 0}));
    const view<const float, 4> queries(&one, {1, window, heads, dim}, {0, 0, 0, 0});
    const auto layer = observe(queries, keys, {.index = 5});
    const policy::refreekv policy{.window = static_cast<count_t>(window)};
    kept_range kept;
    std::vector<std::byte> scratch(1 << 16);
    CHECK(workspace_size(policy, divided<1>(), layer) != 0);
    const policy::snapkv scored{.budget = 5, .window = static_cast<count_t>(window)};
    position_t position;
    kept_tokens count;
    const kept_positions<> positions{{&position, {1, kv_heads, tokens}, {0, 0, 0}},
                                     {&count, {1, kv_heads}, {0, 0}}};
    CHECK(select(scored, divided<1>(), layer, positions, scratch) == status::small_workspace);
    return select(policy, divided<1>(), layer, view(&kept, {1, 1}), scratch);
  };
  constexpr index_t most = max_count;
#if !defined(REFREEKV_TEST_EMULATED)  // a device copies no queries: it has room, and would begin
  CHECK(small(1, 1, most, 10) == status::small_workspace);
#endif
  CHECK(small(most, most, most, most) == status::small_workspace);
  CHECK(small(most, most, 1, 5) == status::small_workspace);
  CHECK(small(most, most, most, most, 1) == status::small_workspace);
  const auto invalid = [&](index_t heads, index_t dim, index_t tokens) {
    const dense keys(view(&one, {1, heads, tokens, dim}, {0, 0, 0, 0}));
    const view<const float, 4> queries(&one, {1, 1, heads, dim}, {0, 0, 0, 0});
    return observe(queries, keys).invalid() != nullptr;
  };
  CHECK(invalid(1, index_t{1} << 62, 10));
  CHECK(invalid(index_t{1} << 62, 1, 10));
  CHECK(invalid(1, 1, index_t{1} << 31));
}

TEST_CASE("why_invalid names what select refuses", "[contract]") {
  const problem p = random_problem(base_seed(), {20});
  const dense_cache<float> cache(p.keys);
  const auto keys = cache.source();
  const auto why = [&](const auto& policy, const auto& layer, index_t groups = 1) {
    std::vector<kept_range> kept(3);
    std::vector<std::byte> scratch(1 << 20);
    const view<kept_range, 2> cuts(kept.data(), {1, groups});
    const char* reason = why_invalid(policy, layer, cuts);
    const status s = select(policy, divided<1>(), layer, cuts, scratch);
    CHECK(s == (reason == nullptr ? status::ok : status::invalid_argument));
    return std::string(reason == nullptr ? "" : reason);
  };
  const auto layer = observe(p.query_view(), keys, p.info());
  CHECK(why(policy::refreekv{}, layer) == "");
  CHECK(why(policy::refreekv{.scope = cut_scope::kv_head}, layer, 2) == "");
  CHECK(why(policy::refreekv{.scope = cut_scope::kv_head}, layer, 1).find("kept") == 0);
  CHECK(why(policy::refreekv{.threshold = -1}, layer).find("threshold") == 0);
  CHECK(why(policy::refreekv{.threshold = 2}, layer).find("threshold") == 0);
  CHECK(why(policy::refreekv{.threshold = std::nan("")}, layer).find("threshold") == 0);
  CHECK(why(policy::refreekv{.threshold = 0}, layer) == "");
  CHECK(why(policy::refreekv{.threshold = 1}, layer) == "");
  CHECK(why(policy::refreekv{.window = 0}, layer).find("window") == 0);
  CHECK(why(policy::refreekv{.window = 4}, layer) == "");
  policy::refreekv wrapped;
  wrapped.window = static_cast<count_t>(-1);
  CHECK(why(wrapped, layer).find("window") == 0);
  wrapped = {};
  wrapped.sinks = static_cast<count_t>(-4);
  CHECK(why(wrapped, layer).find("sinks") == 0);
  wrapped = {};
  wrapped.full_layers = static_cast<count_t>(-4);
  CHECK(why(wrapped, layer).find("full_layers") == 0);
  CHECK(why(policy::streaming_llm{.budget = static_cast<count_t>(-1)}, layer).find("budget") == 0);
  CHECK(why(policy::streaming_llm{.budget = token_budget::share(1.5)}, layer).find("budget") == 0);
  CHECK(why(policy::refreekv{}, observe(p.query_view(), keys)).find("layer_info::index") == 0);
  CHECK(why(policy::refreekv{}, observe(p.query_view(), keys, p.info(-2))).find("layer") == 0);
}

TEST_CASE("NaN, Inf and empty norms keep everything", "[contract]") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (const position_t poisoned : {0, 3, 4, 150, 299}) {
    for (const float poison : {nan, inf, -inf}) {
      problem p = random_problem(base_seed() + 7, {300, 280});
      p.keys.at(0, 0, poisoned, 3) = poison;
      CAPTURE(poisoned, poison);
      for (const auto average : {row_average::mean, row_average::frobenius}) {
        for (const count_t window : {1u, 3u}) {
          const policy::refreekv policy{
              .threshold = 0.3, .window = window, .average = average, .scope = cut_scope::kv_head};
          for_each_layout<float>(p.keys, [&](const char* layout, const auto& cache) {
            INFO(layout);
            const auto layer = observe(p.query_view(), cache.source(), p.info());
            const selection s = ok(run_select(policy, divided<1>(), layer));
            const auto expected = reference::decide(reference::attend(p, 0), 0, 3, policy);
            if (std::isnan(poison)) CHECK(s.at(0, 0).dropped() == 0);
            CHECK(s.at(0, 0).cut == expected.cut);
            CHECK(s.at(0, 1).dropped() > 0);  // the other head of the sequence
            CHECK(s.at(1, 0).dropped() > 0);  // and the other sequence decide as ever
          });
        }
      }
    }
  }
  // Ready rows: in the sinks, in the middle and in a chunk of one token that one row sees.
  for (const index_t poisoned : {0, 100, 260}) {
    for (const auto average : {row_average::mean, row_average::frobenius}) {
      std::vector<float> rows(2 * 2 * 261, 1.0f / 261);
      rows[static_cast<std::size_t>((1 * 2 + 0) * 261 + poisoned)] = nan;
      const float sink = 1;  // of one head of two: ready rows have no use for it
      layer_info<> info{.index = 5};
      info.attention.sink_logits = {&sink, {1}};
      const auto layer = observe_rows(view(rows.data(), {1, 2, 2, 261}), 2, {}, info);
      // Attention to the sinks counts in a full row only: the rows are normalised already.
      const auto norm = poisoned < 4 ? norm_scope::full_row : norm_scope::candidates;
      const policy::refreekv policy{.threshold = 0.3,
                                    .window = 2,
                                    .average = average,
                                    .norm = norm,
                                    .scope = cut_scope::kv_head};
      const selection s = ok(run_select(policy, divided<1>(), layer));
      CAPTURE(poisoned);
      CHECK(s.at(0, 0).dropped() == 0);
      CHECK(s.at(0, 1).dropped() > 0);
    }
  }
  // A query of zeros: uniform attention. Keys that no query sees at all: nothing to lose.
  problem p = random_problem(base_seed() + 8, {300});
  std::fill(p.queries.begin(), p.queries.end(), 0.0f);
  const dense_cache<float> flat(p.keys);
  CHECK(ok(run_select(policy::refreekv{}, divided<1>(),
                      observe(p.query_view(), flat.source(), p.info())))
            .at(0)
            .dropped() == 5);  // (1 - 0.01)^2 of 296 candidates stay: 290.1, so 291
  const std::vector<float> none(300, 0.0f);
  CHECK(ok(run_select(policy::refreekv{}, divided<1>(),
                      observe_rows(view(none.data(), {1, 1, 1, 300}), 1, {}, {.index = 5})))
            .at(0)
            .dropped() == 0);
}

TEST_CASE("the first layers stay whole", "[contract]") {
  const problem p = random_problem(base_seed() + 9, {300});
  const dense_cache<float> keys(p.keys);
  const policy::refreekv policy{.threshold = 0.3, .full_layers = 2};
  for (const index_t layer : {0, 1, 2}) {
    const selection s =
        ok(run_select(policy, divided<1>(), observe(p.query_view(), keys.source(), p.info(layer))));
    CHECK((s.at(0).dropped() == 0) == (layer < 2));
  }
}
