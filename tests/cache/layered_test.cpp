// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cache/layered.hpp"

#include <deque>

#include "layouts.hpp"
#include "ranked_selection.hpp"
#include "selection.hpp"

using namespace refreekv;

namespace {

constexpr index_t layers = 3, heads = 2, group = 2, dim = 32;
const std::vector<position_t> lengths{300, 40};

/// Layers of one shape, each with its own keys.
struct model {
  std::deque<problem> problems;
  std::deque<paged_cache<Eigen::half, std::int32_t>> caches;
  std::vector<decltype(caches[0].source())> sources;
  std::vector<float> queries;  // [layer, sequence, 1, q_head, head_dim]

  model() {
    random_source random(base_seed());
    for (index_t l = 0; l < layers; ++l) {
      problem& p = problems.emplace_back(heads, group, dim, 1, lengths);
      fill(p, random);
      caches.emplace_back(p.keys, 16);
      sources.push_back(caches.back().source());
      queries.insert(queries.end(), p.queries.begin(), p.queries.end());
    }
  }
  auto keys() const { return layered(view(sources.data(), {layers}), sources[0]); }
  auto layer() const {
    const view<const float, 4> rows(queries.data(), {layers * 2, 1, heads * group, dim});
    return observe(rows, keys(), {.index = 5});
  }
  auto seen_of(index_t l) const {
    return observe(problems[size(l)].query_view(), caches[size(l)].source(), {.index = 5});
  }
};

}  // namespace

TEST_CASE("layers in one batch decide as each does alone", "[layered]") {
  const model m;
  const policy::refreekv policy{.threshold = 0.1};
  const selection all = run_select(policy, divided<2>(), m.layer());
  const policy::h2o h2o{.budget = 30, .window = 1};
  const ranked_selection ranked = run_ranked(h2o, divided<2>(), m.layer());
  REQUIRE(all.status == status::ok);
  for (index_t l = 0; l < layers; ++l) {
    const selection alone = run_select(policy, divided<1>(), m.seen_of(l));
    const ranked_selection alone_ranked = run_ranked(h2o, divided<1>(), m.seen_of(l));
    for (index_t s = 0; s < 2; ++s) {
      CHECK(all.at(2 * l + s) == alone.at(s));
      for (index_t h = 0; h < heads; ++h) CHECK(ranked.at(2 * l + s, h) == alone_ranked.at(s, h));
    }
  }
}

TEST_CASE("layers in one batch are compacted as each is alone", "[layered]") {
  const model together, alone;
  const selection kept =
      run_select(policy::refreekv{.threshold = 0.1}, divided<1>(), together.layer());
  const auto how = GENERATE(compaction::sinks_up, compaction::suffix_down);
  REQUIRE(compact(divided<2>(), view(kept.kept.data(), {layers * 2, 1}), how, together.keys()) ==
          status::ok);
  for (index_t l = 0; l < layers; ++l) {
    REQUIRE(compact(divided<1>(), view(kept.kept.data() + 2 * l, {2, 1}), how,
                    alone.sources[size(l)]) == status::ok);
    for (index_t s = 0; s < 2; ++s) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t t = 0; t < lengths[size(s)]; ++t) {
          const auto a = together.sources[size(l)].run_at(s, h, t);
          const auto b = alone.sources[size(l)].run_at(s, h, t);
          REQUIRE(std::memcmp(a.data, b.data, size(dim) * sizeof a.data[0]) == 0);
        }
      }
    }
  }
}

TEST_CASE("layers of different shapes are refused", "[layered]") {
  std::vector<float> rows(200);
  const dense a(view(rows.data(), {1, 2, 10, 8})), b(view(rows.data(), {1, 2, 9, 8}));
  const std::vector same{a, a}, other{a, b};
  CHECK(layered(view(same.data(), {2}), a).invalid() == nullptr);
  CHECK(layered(view(other.data(), {2}), a).invalid() != nullptr);
  CHECK(layered(view<const dense<float>, 1>(nullptr, {2}), a).invalid() != nullptr);
}
