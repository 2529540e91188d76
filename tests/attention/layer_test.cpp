// SPDX-License-Identifier: Apache-2.0
#include "refreekv/attention/layer.hpp"

#include "catch.hpp"
#include "layouts.hpp"
#include "refreekv/attention/observe.hpp"

using namespace refreekv;

namespace {
std::string why(const char* reason) { return reason == nullptr ? "" : reason; }
}  // namespace

TEST_CASE("an observation has the sizes of its tensors", "[observation]") {
  const problem p(2, 3, 8, 5, {7, 9});
  const dense_cache<float> cache(p.keys);
  const auto layer = observe(p.query_view(), cache.source());
  static_assert(attention_layer<std::decay_t<decltype(layer)>>);
  CHECK(layer.sequences() == 2);
  CHECK(layer.q_heads() == 6);
  CHECK(layer.kv_heads() == 2);
  CHECK(layer.window() == 5);
  CHECK(layer.head_dim() == 8);
  CHECK(layer.tokens(0) == 7);
  CHECK(layer.capacity() >= 9);
  CHECK(layer.scale() == Approx(1 / std::sqrt(8.0)));
  CHECK(why(layer.invalid()) == "");

  const auto alone = observe(cache.source());
  static_assert(model_layer<std::decay_t<decltype(alone)>>);
  static_assert(!attention_layer<std::decay_t<decltype(alone)>>);
  CHECK(alone.q_heads() == 2);
  CHECK(why(alone.invalid()) == "");
}

TEST_CASE("queries that do not fit the keys are refused in words", "[observation]") {
  const problem p(2, 2, 8, 1, {7});
  const dense_cache<float> cache(p.keys);
  const auto refused = [&](std::array<index_t, 4> e, layer_info<> info = {}) {
    const view<const float, 4> queries(p.queries.data(), {e[0], e[1], e[2], e[3]});
    return why(observe(queries, cache.source(), info).invalid());
  };
  CHECK(refused({1, 1, 4, 8}) == "");
  CHECK(refused({1, 1, 3, 8}).find("q_heads") == 0);
  CHECK(refused({2, 1, 4, 8}).find("queries and keys differ in sequences") == 0);
  CHECK(refused({1, 1, 4, 4}).find("queries and keys differ in head_dim") == 0);
  CHECK(refused({1, 0, 4, 8}).find("a window") == 0);
  CHECK(refused({1, -1, 4, 8}).find("queries need") == 0);

  const std::vector<float> per_head(4);
  layer_info<> info;
  info.attention.alibi_slopes = {per_head.data(), {3}};
  CHECK(refused({1, 1, 4, 8}, info).find("alibi_slopes") == 0);
  info.attention.alibi_slopes = {per_head.data(), {4}};
  info.attention.sink_logits = {per_head.data(), {1}};
  CHECK(refused({1, 1, 4, 8}, info).find("sink_logits") == 0);
  for (const float bad : {-1.0f, std::nanf(""), std::numeric_limits<float>::infinity()}) {
    info = {};
    info.attention.scale = bad;
    CHECK(refused({1, 1, 4, 8}, info).find("scale") == 0);
    info = {};
    info.attention.soft_cap = bad;
    CHECK(refused({1, 1, 4, 8}, info).find("soft_cap") == 0);
  }
  info = {};
  info.attention.sliding_window = static_cast<count_t>(-1);
  CHECK(refused({1, 1, 4, 8}, info).find("sliding_window") == 0);
}

TEST_CASE("counts and ends of rows that cannot be are refused in words", "[observation]") {
  const problem p(2, 2, 8, 3, {7, 0});
  const dense_cache<float> cache(p.keys);
  const auto refused = [&](std::vector<position_t> counts, std::vector<position_t> ends) {
    layer_info<> info{.index = 5};
    if (!counts.empty()) info.rows.counts = {counts.data(), {static_cast<index_t>(counts.size())}};
    if (!ends.empty()) {
      info.rows.ends = {ends.data(), {static_cast<index_t>(ends.size()) / 3, 3}};
    }
    const std::string of_queries = why(observe(p.query_view(), cache.source(), info).invalid());
    const std::vector<float> rows(2 * 3 * 4 * 7);
    const lengths_view<> lengths(p.lengths.data(), {2});
    const view attention(rows.data(), {2, 3, 4, 7});
    CHECK(of_queries == why(observe_rows(attention, 2, lengths, info).invalid()));
    return of_queries;
  };
  CHECK(refused({3, 0}, {}) == "");
  CHECK(refused({0, 3}, {5, 6, 7, 0, 0, 0}) == "");
  CHECK(refused({3}, {}).find("row counts must be") == 0);
  CHECK(refused({4, 0}, {}).find("a row count is outside") == 0);
  CHECK(refused({-1, 0}, {}).find("a row count is outside") == 0);
  CHECK(refused({}, {7, 7, 7}).find("row ends must be") == 0);
  CHECK(refused({}, {7, 8, 7, 0, 0, 0}).find("a row end is outside") == 0);
  CHECK(refused({}, {0, 7, 7, 0, 0, 0}).find("a row end is outside") == 0);
  CHECK(refused({2, 0}, {0, 7, 7, 0, 0, 0}) == "");  // of a row that does not exist
}

TEST_CASE("rows that cannot be are refused in words", "[observation]") {
  const std::vector<float> values(100);
  const view rows(values.data(), {1, 1, 4, 10});
  CHECK(why(observe_rows(rows, 2).invalid()) == "");
  CHECK(why(observe_rows(rows, 3).invalid()).find("q_heads") == 0);
  CHECK(why(observe_rows(rows, 0).invalid()).find("kv_heads") == 0);
  const position_t length = 11;
  CHECK(why(observe_rows(rows, 2, {&length, {1}}).invalid()).find("a length") == 0);
}
