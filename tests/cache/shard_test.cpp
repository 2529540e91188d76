// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cache/shard.hpp"

#include <deque>

#include "random_problem.hpp"
#include "ranks.hpp"

using namespace refreekv;

namespace {

constexpr index_t parts_of_rank = 2;

/// Which tokens of which sequence a rank has: [sequence, part].
using parts_table = std::vector<token_range>;

/// How sequences are split: rank r of R has parts r and 2R - 1 - r of 2R, or of each of the 2R any
/// two. Parts may be empty.
enum class split { even, zigzag, random };

/// [rank]
std::vector<parts_table> split_tokens(const std::vector<position_t>& lengths, index_t sinks,
                                      index_t ranks, split how, random_source& random) {
  std::vector<parts_table> of(size(ranks));
  const index_t count = ranks * parts_of_rank;
  for (const position_t tokens : lengths) {
    const chunking chunks{tokens, sinks};
    std::vector<index_t> begins{0}, order(size(count));
    for (index_t i = 1; i < count; ++i) {
      const index_t chunk = random.between(0, chunks.count());
      begins.push_back(chunk == chunks.count() ? tokens : chunks[chunk].begin);
    }
    std::sort(begins.begin(), begins.end());
    begins.push_back(tokens);
    std::iota(order.begin(), order.end(), index_t{0});
    if (how == split::random) std::shuffle(order.begin(), order.end(), random.engine());
    for (index_t r = 0; r < ranks; ++r) {
      const index_t first = how == split::even ? 2 * r : r;
      const index_t second = how == split::even ? 2 * r + 1 : count - 1 - r;
      const auto [earlier, later] = std::minmax({order[size(first)], order[size(second)]});
      for (const index_t i : {earlier, later}) {
        of[size(r)].push_back(how == split::random
                                  ? token_range{begins[size(i)], begins[size(i) + 1]}
                                  : even_part(chunks, i, count));
      }
    }
  }
  return of;
}

/// One rank's tokens.
struct rank_part {
  parts_table parts;
  std::vector<position_t> totals;
  plain_rows rows;

  rank_part(const plain_rows& all, const parts_table& own)
      : parts(own), totals(all.lengths), rows(all.kv_heads, all.head_dim, lengths()) {
    for (index_t s = 0; s < all.sequences(); ++s) {
      index_t to = 0;
      for (index_t p = 0; p < parts_of_rank; ++p) {
        const auto [begin, end] = parts[size(s * parts_of_rank + p)];
        for (index_t t = begin; t < end; ++t, ++to) {
          for (index_t h = 0; h < all.kv_heads; ++h) {
            for (index_t d = 0; d < all.head_dim; ++d) {
              rows.at(s, h, to, d) = all.at(s, h, t, d);
            }
          }
        }
      }
    }
  }
  index_t sequences() const { return static_cast<index_t>(totals.size()); }
  auto of(const auto& source, index_t capacity) const {
    return shard(source, view(parts.data(), {sequences(), parts_of_rank}),
                 lengths_view<>(totals.data(), {sequences()}), capacity);
  }

 private:
  std::vector<position_t> lengths() const {
    std::vector<position_t> own(totals.size());
    for (std::size_t i = 0; i < parts.size(); ++i) {
      own[i / parts_of_rank] += static_cast<position_t>(parts[i].end - parts[i].begin);
    }
    return own;
  }
};

/// What every rank selects, and whether they told each other only what one of them had found.
struct outcome {
  std::vector<selection> ranks;
  bool is_exclusive;
};

/// make_cache(rows): a cache of any layout.
template <class MakeCache>
outcome select_on_ranks(const problem& p, const policy::refreekv& policy,
                        const std::vector<parts_table>& parts, const MakeCache& make_cache) {
  const auto ranks = static_cast<index_t>(parts.size());
  rank_group group(ranks);
  outcome out{std::vector<selection>(parts.size()), true};
  run_ranks(ranks, [&](index_t rank) {
    const rank_part own(p.keys, parts[size(rank)]);
    const auto cache = make_cache(own.rows);
    const auto layer =
        observe(p.query_view(), own.of(cache.source(), p.keys.longest() + 300), p.info());
    const auto run = [&](const auto& exec) {
      out.ranks[size(rank)] = select_on_rank(policy, exec, layer, token_link{&group, rank});
    };
    if (rank % 2 == 0) {
      run(divided<1>());
    } else {
      run(divided<3>());
    }
  });
  out.is_exclusive = group.is_exclusive();
  return out;
}

/// Every rank's decision is the single rank's, bit for bit.
template <class MakeCache>
void check_ranks(const problem& p, const policy::refreekv& policy, index_t ranks, split how,
                 random_source& random, const MakeCache& make_cache) {
  const auto cache = make_cache(p.keys);
  const selection expected =
      run_select(policy, divided<1>(), observe(p.query_view(), cache.source(), p.info()));
  REQUIRE(expected.status == status::ok);
  const outcome got = select_on_ranks(
      p, policy, split_tokens(p.lengths, policy.sinks, ranks, how, random), make_cache);
  CHECK(got.is_exclusive);
  for (const selection& rank : got.ranks) {
    REQUIRE(rank.status == status::ok);
    for (std::size_t i = 0; i < expected.kept.size(); ++i) CHECK(rank.kept[i] == expected.kept[i]);
  }
}

std::string why(const char* reason) { return reason == nullptr ? "" : reason; }

}  // namespace

TEST_CASE("even parts are whole chunks, of a sequence all, and equally many to one", "[shard]") {
  for (const index_t sinks : {0, 1, 4, 256, 300}) {
    for (const index_t tokens : {0, 1, 4, 5, 260, 261, 517, 5000}) {
      for (const index_t count : {1, 2, 3, 7, 40}) {
        CAPTURE(sinks, tokens, count);
        const chunking chunks{tokens, sinks};
        index_t end = 0, fewest = chunks.count(), most = 0;
        for (index_t i = 0; i < count; ++i) {
          const token_range part = even_part(chunks, i, count);
          CHECK(part.begin == end);
          CHECK(part.end >= part.begin);
          CHECK((part.end == tokens || chunks[chunks.of(part.end)].begin == part.end));
          if (i == 0) CHECK(part.end >= std::min(sinks, tokens));
          end = part.end;
          const index_t candidates = part.end - std::max(part.begin, std::min(sinks, part.end));
          const index_t own = (candidates + chunk_tokens - 1) / chunk_tokens;
          fewest = std::min(fewest, own);
          most = std::max(most, own);
        }
        CHECK(end == tokens);
        CHECK(most <= fewest + 1);
      }
    }
  }
}

TEST_CASE("a shard gives the whole sequence's rows under their own numbers", "[shard]") {
  plain_rows rows(2, 5, {900, 0, 3, 261});
  float next = 0;
  for (auto& sequence : rows.values) {
    for (float& v : sequence) v = next++;
  }
  random_source random(base_seed());
  const auto how = GENERATE(split::even, split::zigzag, split::random);
  for (const index_t sinks : {0, 4, 300}) {
    std::vector<std::vector<int>> owners;
    for (const position_t n : rows.lengths) owners.emplace_back(size(n), 0);
    for (const parts_table& parts : split_tokens(rows.lengths, sinks, 3, how, random)) {
      const rank_part part(rows, parts);
      for_each_layout<float>(part.rows, [&](const char* layout, const auto& cache) {
        CAPTURE(layout, sinks);
        const auto keys = part.of(cache.source(), 1000);
        static_assert(row_source<decltype(keys)> && sharded_source<decltype(keys)>);
        static_assert(!kv_source<decltype(keys)>);
        CHECK(why(keys.invalid()) == "");
        CHECK(why(keys.splits_chunk(sinks)) == "");
        CHECK(keys.shape().capacity == 1000);
        for (index_t s = 0; s < keys.shape().sequences; ++s) {
          CHECK(keys.tokens(s) == rows.lengths[size(s)]);
          index_t before = 0;
          for (index_t t = 0; t < keys.tokens(s); ++t) {
            REQUIRE(keys.local_before(s, t) == before);
            if (!keys.owns(s, t)) continue;
            ++before;
            if (std::string(layout) == "segmented") ++owners[size(s)][size(t)];
            const auto run = keys.run_at(s, 1, t);
            REQUIRE(run.tokens >= 1);
            for (index_t i = 0; i < run.tokens; ++i) {
              REQUIRE(keys.owns(s, t + i));
              REQUIRE(run.data[i * run.token_stride + 4 * run.dim_stride] ==
                      rows.at(s, 1, t + i, 4));
            }
          }
          CHECK(before == keys.source().tokens(s));
          const chunking chunks{keys.tokens(s), sinks};
          std::vector<index_t> own, expected;
          for (index_t i = 0; i < keys.local_chunks(s, chunks); ++i) {
            own.push_back(keys.local_chunk(s, chunks, i));
          }
          for (index_t c = 0; c < chunks.count(); ++c) {
            if (keys.owns(s, chunks[c].begin)) expected.push_back(c);
          }
          CHECK(own == expected);
        }
      });
    }
    for (const auto& sequence : owners) {
      CHECK(std::all_of(sequence.begin(), sequence.end(), [](int n) { return n == 1; }));
    }
  }
}

TEST_CASE("tokens on several ranks are cut as on one, bit for bit", "[shard]") {
  for (unsigned seed = base_seed(); seed < base_seed() + affordable(150); ++seed) {
    random_source random(seed);
    const problem p = random_problem(random, exhaustive ? random.one_of<position_t>({1, 3}) : 1);
    const policy::refreekv policy = random_rule(random, p.window);
    const auto ranks = random.one_of<index_t>({1, 2, 3, 4, 7});
    const auto how = random.one_of({split::even, split::zigzag, split::random});
    INFO("REFREEKV_SEED=" << seed << " ranks " << ranks << " split " << static_cast<int>(how)
                          << " sinks " << policy.sinks << " window " << policy.window);
    const auto check = [&](const auto& make_cache) {
      check_ranks(p, policy, ranks, how, random, make_cache);
    };
    switch (random.between(0, 3)) {
      case 0: check([](const plain_rows& rows) { return dense_cache<float>(rows); }); break;
      case 1:
        check([](const plain_rows& rows) {
          return any_layout(dense_cache<Eigen::bfloat16>(rows, axis_order::head_dim_token));
        });
        break;
      case 2:
        check(
            [](const plain_rows& rows) { return any_layout(paged_cache<Eigen::half>(rows, 16)); });
        break;
      default:
        check(
            [](const plain_rows& rows) { return any_layout(segmented_cache<Eigen::half>(rows)); });
    }
  }
}

TEST_CASE("every option cuts the same on every number of ranks", "[shard]") {
  random_source random(base_seed());
  problem p(2, 2, 16, 8, {exhaustive ? 1800 : 800, 600, 5, 0, 3});
  fill(p, random);
  const auto make_cache = [](const plain_rows& rows) { return dense_cache<float>(rows); };
  const auto some = exhaustive ? std::vector<index_t>{1, 2, 3, 4, 7} : std::vector<index_t>{3};
  for (const index_t ranks : some) {
    for (const count_t window : {1u, 8u}) {
      for (const auto average : {row_average::mean, row_average::frobenius}) {
        for (const auto norm : {norm_scope::candidates, norm_scope::full_row}) {
          for (const auto scope : {cut_scope::layer, cut_scope::kv_head}) {
            CAPTURE(ranks, window, static_cast<int>(average), static_cast<int>(norm),
                    static_cast<int>(scope));
            check_ranks(p,
                        {.threshold = 0.1,
                         .window = window,
                         .average = average,
                         .norm = norm,
                         .scope = scope},
                        ranks, split::zigzag, random, make_cache);
          }
        }
      }
    }
  }
}

TEST_CASE("NaN, Inf and rows of zeros are the same on all ranks", "[shard]") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const auto make_cache = [](const plain_rows& rows) { return dense_cache<float>(rows); };
  for (const position_t poisoned : {0, 3, 4, 700, 1099}) {
    for (const float poison : {nan, inf, -inf, 0.0f}) {
      for (const count_t window : {1u, 3u}) {
        CAPTURE(poisoned, poison, window);
        random_source random(base_seed());
        problem p(2, 2, 8, 3, {1100, 600});
        fill(p, random);
        p.keys.at(0, 0, poisoned, 3) = poison;
        if (poison == 0) std::fill(p.queries.begin(), p.queries.end(), 0.0f);
        const policy::refreekv policy{
            .threshold = 0.3, .window = window, .scope = cut_scope::kv_head};
        check_ranks(p, policy, 3, split::even, random, make_cache);
      }
    }
  }
}

TEST_CASE("heads and tokens may both be split", "[shard]") {
  constexpr index_t head_ranks = 3, token_ranks = 2;
  for (unsigned seed = base_seed(); seed < base_seed() + 5; ++seed) {
    INFO("REFREEKV_SEED=" << seed);
    random_source random(seed);
    problem p(head_ranks, 2, 16, 2, {1500, 300});
    fill(p, random);
    const policy::refreekv policy{.threshold = 0.05, .window = 2};
    const auto parts = split_tokens(p.lengths, policy.sinks, token_ranks, split::zigzag, random);
    const auto run = [&](bool split_tokens_too) {
      const index_t columns = split_tokens_too ? token_ranks : 1;
      std::deque<rank_group> of_heads, of_tokens;
      for (index_t c = 0; c < columns; ++c) of_heads.emplace_back(head_ranks);
      for (index_t h = 0; h < head_ranks; ++h) of_tokens.emplace_back(columns);
      std::vector<selection> got(size(head_ranks * columns));
      run_ranks(head_ranks * columns, [&](index_t rank) {
        const index_t head = rank / columns, column = rank % columns;
        const grid_link link{{&of_heads[size(column)], head}, {&of_tokens[size(head)], column}};
        const problem heads = heads_of(p, head, head + 1);
        const auto select_from = [&](const auto& keys) {
          got[size(rank)] = select_on_rank(policy, divided<1>(),
                                           observe(heads.query_view(), keys, heads.info()), link);
        };
        if (split_tokens_too) {
          const rank_part own(heads.keys, parts[size(column)]);
          const dense_cache<float> cache(own.rows);
          select_from(own.of(cache.source(), 2000));
        } else {
          select_from(dense_cache<float>(heads.keys).source());
        }
      });
      return got;
    };
    const dense_cache<float> cache(p.keys);
    const selection expected =
        run_select(policy, divided<1>(), observe(p.query_view(), cache.source(), p.info()));
    const std::vector<selection> heads = run(false), both = run(true);
    for (index_t rank = 0; rank < head_ranks * token_ranks; ++rank) {
      REQUIRE(both[size(rank)].status == status::ok);
      for (index_t s = 0; s < 2; ++s) {
        // Of the same heads the same bits; all heads' sum is added up in another order.
        const kept_range& k = both[size(rank)].at(s);
        CHECK(k == heads[size(rank / token_ranks)].at(s));
        CHECK(k.cut == expected.at(s).cut);
        CHECK(k.loss == Approx(expected.at(s).loss).margin(1e-7));
      }
    }
  }
}

TEST_CASE("ranks tell each other three floats a row and chunk, whatever a key's size", "[shard]") {
  for (const index_t dim : {8, 32}) {
    random_source random(base_seed());
    problem p(2, 3, dim, 4, {1000});
    fill(p, random);
    const auto parts = split_tokens(p.lengths, 4, 1, split::even, random);
    const rank_part own(p.keys, parts[0]);
    const dense_cache<float> cache(own.rows);
    const auto layer = observe(p.query_view(), own.of(cache.source(), 1200), p.info());
    const auto words = [&](const policy::refreekv& policy) {
      std::vector<index_t> counts;
      const auto link = [&](std::uint32_t*, index_t count) {
        counts.push_back(count);
        return status::ok;
      };
      CHECK(select_on_rank(policy, divided<1>(), layer, link).status == status::ok);
      return counts;
    };
    const index_t chunks = chunking{1200, 4}.count();
    using list = std::vector<index_t>;
    CHECK(words({}) == list{6 * chunks * 3, 512, 256});
    CHECK(words({.window = 4, .average = row_average::frobenius}) ==
          list{6 * 4 * chunks * 3, 512, 256});
    CHECK(words({.window = 4, .scope = cut_scope::kv_head}) ==
          list{6 * 4 * chunks * 3, 6 * 4 * chunks * 3, 2 * 512, 2 * 256});
    CHECK(words({.full_layers = 10}) == list{});
  }
}

TEST_CASE("an exchange's error ends select", "[shard]") {
  random_source random(base_seed());
  problem p(1, 1, 8, 2, {300});
  fill(p, random);
  const rank_part own(p.keys, split_tokens(p.lengths, 4, 1, split::even, random)[0]);
  const dense_cache<float> cache(own.rows);
  const auto layer = observe(p.query_view(), own.of(cache.source(), 300), p.info());
  for (int last = 0; last < 4; ++last) {
    int calls = 0;
    const auto broken = [&](std::uint32_t*, index_t) {
      return calls++ < last ? status::ok : status::device_error;
    };
    CHECK(run_select(policy::refreekv{.window = 2}, divided<1>(), layer, 0, broken).status ==
          status::device_error);
    CHECK(calls == last + 1);
  }
}

TEST_CASE("each rank compacts what it keeps of its own", "[shard]") {
  random_source random(base_seed());
  const plain_rows rows(2, 4, {1300, 700, 2});
  for (const auto how : {split::even, split::zigzag, split::random}) {
    for (int turn = 0; turn < 20; ++turn) {
      std::vector<kept_range> all;
      for (const position_t n : rows.lengths) {
        for (index_t h = 0; h < 2; ++h) {
          const auto sinks = static_cast<position_t>(std::min<index_t>(n, 4));
          all.push_back(
              {sinks, static_cast<position_t>(random.between(sinks, n)), n, 0.25f, 0.125f});
        }
      }
      std::vector<index_t> kept_tokens(all.size());
      for (const parts_table& parts : split_tokens(rows.lengths, 4, 3, how, random)) {
        const rank_part part(rows, parts);
        plain_rows numbers = part.rows;  // each row is its token's number
        const dense_cache<float> shape(part.rows);
        const auto keys = part.of(shape.source(), 1300);
        for (index_t s = 0; s < 3; ++s) {
          for (index_t t = 0; t < keys.tokens(s); ++t) {
            for (index_t h = 0; keys.owns(s, t) && h < 2; ++h) {
              numbers.at(s, h, keys.local_before(s, t), 0) = static_cast<float>(t);
            }
          }
        }
        const paged_cache<float> cache(numbers, 16);
        std::vector<kept_range> own(all.size());
        const view<kept_range, 2> to(own.data(), {3, 2});
        REQUIRE(local_ranges(divided<1>(), part.of(cache.source(), 1300), view(all.data(), {3, 2}),
                             to) == status::ok);
        REQUIRE(compact(divided<1>(), view<const kept_range, 2>(to), compaction::sinks_up,
                        cache.source()) == status::ok);
        for (std::size_t i = 0; i < all.size(); ++i) {
          const auto s = static_cast<index_t>(i) / 2, h = static_cast<index_t>(i) % 2;
          CHECK(own[i].loss == 0.25f);
          CHECK(own[i].dropped_mass == 0.125f);
          CHECK(own[i].tokens == part.rows.lengths[size(s)]);
          index_t slot = first_slot(own[i], compaction::sinks_up);
          for (index_t t = 0; t < all[i].tokens; ++t) {
            if (!keys.owns(s, t) || !all[i].keeps(t)) continue;
            REQUIRE(*cache.source().run_at(s, h, slot++).data == static_cast<float>(t));
            ++kept_tokens[i];
          }
          CHECK(slot == own[i].tokens);
        }
      }
      for (std::size_t i = 0; i < all.size(); ++i) CHECK(kept_tokens[i] == all[i].length());
    }
  }
  const rank_part one(rows, split_tokens(rows.lengths, 4, 1, split::even, random)[0]);
  const dense_cache<float> cache(one.rows);
  std::vector<kept_range> kept(6);
  const auto refused = [&](view<const kept_range, 2> all, view<kept_range, 2> own) {
    const auto keys = one.of(cache.source(), 1300);
    const bool is_refused = local_ranges(divided<1>(), keys, all, own) == status::invalid_argument;
    CHECK((why_invalid(keys, all, own) != nullptr) == is_refused);
    return is_refused;
  };
  CHECK(refused({kept.data(), {3, 2}}, {kept.data(), {3, 1}}));
  CHECK(refused({kept.data(), {2, 1}}, {kept.data(), {2, 1}}));
  CHECK(refused({nullptr, {3, 1}}, {kept.data(), {3, 1}}));
  CHECK(!refused({kept.data(), {3, 1}}, {kept.data(), {3, 1}}));
}

TEST_CASE("shards that do not fit together are refused in words", "[shard]") {
  problem p(1, 1, 4, 1, {600});
  const dense_cache<float> cache(p.keys);
  const auto reason = [&](std::vector<token_range> parts, index_t sequences = 1,
                          index_t capacity = 1000, position_t tokens = 1000) {
    const auto count = static_cast<index_t>(parts.size());
    const shard keys(cache.source(), view(parts.data(), {sequences, count / sequences}),
                     lengths_view<>(&tokens, {1}), capacity);
    kept_range kept;
    const auto layer = observe(p.query_view(), keys, p.info());
    const auto link = [](std::uint32_t*, index_t) { return status::ok; };
    const policy::refreekv policy;
    const std::string words = why(why_invalid(policy, layer, {&kept, {1, 1}}));
    std::vector<std::byte> scratch(1 << 20);
    CHECK((select(policy, divided<1>(), layer, {&kept, {1, 1}}, scratch, link) == status::ok) ==
          (words == ""));
    return words;
  };
  CHECK(reason({{0, 260}, {516, 856}}).find("where chunks do") != std::string::npos);
  CHECK(reason({{0, 4}, {404, 1000}}).find("where chunks do") != std::string::npos);
  CHECK(reason({{0, 600}}, 1, 1000, 600) == "");
  CHECK(reason({{0, 0}, {0, 600}, {600, 600}}, 1, 600, 600) == "");
  CHECK(reason({{0, 516}, {516, 700}}).find("differ in tokens") != std::string::npos);
  CHECK(reason({{0, 600}}, 1, 599, 600).find("a length") == 0);
  CHECK(reason({{400, 1000}}, 1, -1).find("capacity") == 0);
  CHECK(reason({{516, 1000}, {0, 116}}).find("ascend") != std::string::npos);
  CHECK(reason({{0, 516}, {260, 344}}).find("ascend") != std::string::npos);
  CHECK(reason({{516, 1116}}).find("ascend") != std::string::npos);
  CHECK(reason({{0, 260}, {260, 600}}, 2).find("[sequence, part]") != std::string::npos);
}
