// SPDX-License-Identifier: Apache-2.0
// Every option outside its range, and every observation that does not fit, is refused by name.
#include "layouts.hpp"
#include "ranked_selection.hpp"

using namespace refreekv;

namespace {

constexpr count_t wrapped = static_cast<count_t>(-1);

/// The first word of why select refuses; checks that it does.
template <class Policy, class Layer>
std::string why(const Policy& policy, const Layer& layer) {
  guarded_positions guarded(layer.sequences(), layer.kv_heads(), layer.capacity());
  const char* reason = why_invalid(policy, layer, guarded.kept());
  std::vector<std::byte> scratch(1 << 20);
  const status s = select(policy, divided<1>(), layer, guarded.kept(), scratch);
  CHECK(s == (reason == nullptr ? status::ok : status::invalid_argument));
  CHECK((workspace_size(policy, divided<1>(), layer) == 0) ==
        (policy.invalid() != nullptr || layer.invalid() != nullptr));
  const std::string text = reason == nullptr ? "" : reason;
  return text.substr(0, text.find(' '));
}

}  // namespace

TEST_CASE("options outside their range are named", "[policy]") {
  problem p(2, 2, 8, 40, {30});
  random_source random(base_seed());
  fill(p, random);
  const dense_cache<float> cache(p.keys);
  const auto layer = observe(p.query_view(), cache.source(), p.info());
  using namespace refreekv::policy;
  CHECK(why(h2o{}, layer) == "");
  CHECK(why(h2o{.budget = wrapped}, layer) == "budget");
  CHECK(why(h2o{.budget = -1}, layer) == "budget");
  CHECK(why(h2o{.recent = token_budget::share(2)}, layer) == "recent");
  CHECK(why(h2o{.window = 0}, layer) == "window");
  CHECK(why(snapkv{}, layer) == "");
  CHECK(why(snapkv{.budget = token_budget::share(-1)}, layer) == "budget");
  CHECK(why(snapkv{.window = wrapped}, layer) == "window");
  CHECK(why(snapkv{.pool = {pool_kind::max, 4}}, layer) == "pool.width");
  CHECK(why(snapkv{.pool = {pool_kind::max, 0}}, layer) == "pool.width");
  CHECK(why(snapkv{.head_floor = 0}, layer) == "");
  CHECK(why(snapkv{.head_floor = -0.1}, layer) == "head_floor");
  CHECK(why(snapkv{.head_floor = 1.1}, layer) == "head_floor");
  CHECK(why(snapkv{.head_floor = std::nan("")}, layer) == "head_floor");
  CHECK(why(pyramidkv{}, layer) == "");
  CHECK(why(pyramidkv{.budget = wrapped}, layer) == "budget");
  CHECK(why(pyramidkv{.window = 0}, layer) == "window");
  CHECK(why(pyramidkv{.pool = {pool_kind::average, 2}}, layer) == "pool.width");
  CHECK(why(pyramidkv{.beta = 0}, layer) == "beta");
  CHECK(why(pyramidkv{.layers = 0}, layer) == "layers");
  CHECK(why(pyramidkv{.layers = 9}, layer) == "layer_info::index");  // this is the tenth
  CHECK(why(tova{}, layer) == "");
  CHECK(why(tova{.budget = wrapped}, layer) == "budget");
  CHECK(why(tova{.budget = token_budget::share(1.5)}, layer) == "budget");
  CHECK(why(attention_ranked{}, layer) == "");
  CHECK(why(attention_ranked{.threshold = -0.1}, layer) == "threshold");
  CHECK(why(attention_ranked{.window = 0}, layer) == "window");
  CHECK(why(attention_ranked{.recent = wrapped}, layer) == "recent");
  CHECK(why(attention_ranked{.full_layers = wrapped}, layer) == "full_layers");
  CHECK(why(twilight{}, layer) == "");
  CHECK(why(twilight{.mass = std::nan("")}, layer) == "mass");
  CHECK(why(twilight{.mass = 1.1}, layer) == "mass");
  CHECK(why(twilight{.selector_budget = 0}, layer) == "selector_budget");
  CHECK(why(twilight{.full_layers = wrapped}, layer) == "full_layers");
  CHECK(why(cake_decode{}, layer) == "");
  CHECK(why(cake_decode{.budget = wrapped}, layer) == "budget");
  CHECK(why(cake_decode{.recent = wrapped}, layer) == "recent");
  CHECK(why(cake_decode{.pool = {pool_kind::average, 2}}, layer) == "pool.width");
}

TEST_CASE("a rule looks at the rows that there are", "[policy]") {
  problem p(2, 2, 8, 4, {30, 3});
  const dense_cache<float> cache(p.keys);
  const auto layer = observe(p.query_view(), cache.source(), p.info());
  using namespace refreekv::policy;
  CHECK(why(h2o{}, layer) == "");
  CHECK(why(snapkv{.window = 5}, layer) == "");
  CHECK(why(pyramidkv{.window = 5}, layer) == "");
  CHECK(why(attention_ranked{.window = 5}, layer) == "");
  std::vector<float> scores(size(2 * 2 * layer.capacity()));
  const scores_view<> all(scores.data(), {2, 2, layer.capacity()});
  CHECK(why(h2o{}, with_scores(layer, all)) == "");
  CHECK(why(h2o{.budget = token_budget::share(0.5)}, with_scores(layer, all)) == "budget");
}

TEST_CASE("rules that tell layers apart ask which one they see", "[policy]") {
  problem p(2, 2, 8, 4, {30, 3});
  const dense_cache<float> cache(p.keys);
  const auto layer = observe(p.query_view(), cache.source());
  using namespace refreekv::policy;
  CHECK(why(attention_ranked{}, layer) == "layer_info::index");
  CHECK(why(attention_ranked{.full_layers = 0}, layer) == "");
  CHECK(why(twilight{}, layer) == "layer_info::index");
  CHECK(why(twilight{.full_layers = 0}, layer) == "");
  CHECK(why(pyramidkv{}, layer) == "layer_info::index");
  CHECK(why(h2o{}, layer) == "");
  CHECK(why(snapkv{}, layer) == "");
  CHECK(why(tova{}, layer) == "");
  CHECK(why(cake_decode{}, layer) == "");
}

TEST_CASE("no budget empties a cache", "[policy]") {
  problem p(2, 2, 8, 4, {30, 1, 0});
  random_source random(base_seed());
  fill(p, random);
  const dense_cache<float> cache(p.keys);
  const auto layer = observe(p.query_view(), cache.source(), p.info());
  const auto keeps_the_newest = [&](const auto& policy) {
    const ranked_selection kept = run_ranked(policy, divided<1>(), layer);
    CHECK(kept.at(0, 1) == std::vector<position_t>{29});
    CHECK(kept.at(1, 1) == std::vector<position_t>{0});
    CHECK(kept.at(2, 1).empty());
  };
  keeps_the_newest(policy::h2o{.budget = 0});
  keeps_the_newest(policy::h2o{.budget = token_budget::share(0), .recent = 0});
  keeps_the_newest(policy::tova{.budget = 0});
  keeps_the_newest(policy::cake_decode{.budget = 0, .recent = 0});
  const policy::streaming_llm policy{.sinks = 0, .budget = 5, .incoming = 10};
  CHECK(policy(30) == kept_range{0, 29, 30});
  CHECK(policy(0) == kept_range{});
}

TEST_CASE("state of another shape is refused", "[policy]") {
  problem p(2, 2, 8, 40, {30});
  const dense_cache<float> cache(p.keys);
  const auto layer = observe(p.query_view(), cache.source(), p.info(3));
  const index_t n = layer.capacity();
  std::vector<float> scores(size(2 * n));
  std::vector<double> preferences(8);
  const cake_layers<> good{{scores.data(), {1, 2, n}}, {preferences.data(), {1, 8}}, 4};
  const auto cake_with = [&](const auto& change, const policy::cake& policy = {.window = 8}) {
    cake_layers<> layers = good;
    change(layers);
    return why(policy, with_layers(layer, layers));
  };
  CHECK(cake_with([](auto&) {}) == "");
  CHECK(cake_with([](auto& l) { l.finished = 3; }) == "finished");
  CHECK(cake_with([](auto& l) { l.finished = 9; }) == "preferences");
  CHECK(cake_with([&](auto& l) { l.scores = {scores.data(), {1, 1, n}}; }) == "scores");
  CHECK(cake_with([&](auto& l) { l.scores = {scores.data(), {1, 2, n - 1}}; }) == "scores");
  CHECK(cake_with([](auto&) {}, {.window = 8, .layers = 3}) == "more");
  CHECK(cake_with([](auto&) {}, {.window = 0}) == "window");
  CHECK(cake_with([](auto&) {}, {.window = 8, .layers = 0}) == "layers");
  CHECK(cake_with([](auto&) {}, {.window = 8, .gamma = -1}) == "gamma");
  CHECK(cake_with([](auto&) {}, {.window = 8, .tau1 = 0}) == "tau1");
  CHECK(cake_with([](auto&) {}, {.window = 8, .pool = {pool_kind::max, 6}}) == "pool.width");
  CHECK(why(policy::h2o{}, with_scores(layer, {scores.data(), {1, 2, n - 1}})) == "scores");

  std::vector<float> bounds(size(2 * n * 2 * 8));
  const auto twilight_with = [&](index_t pages, index_t page_tokens) {
    return why(policy::twilight{},
               with_pages(layer, {{bounds.data(), {1, 2, pages, 2, 8}}, page_tokens}));
  };
  CHECK(twilight_with((n + 15) / 16, 16) == "");
  CHECK(twilight_with((n + 15) / 16 - 1, 16) == "page");
  CHECK(twilight_with(1, 0) == "page_tokens");
}

TEST_CASE("positions of another shape are refused", "[policy]") {
  problem p(2, 2, 8, 4, {30});
  const dense_cache<float> cache(p.keys);
  const auto layer = observe(p.query_view(), cache.source(), p.info());
  std::vector<position_t> positions(200);
  std::vector<kept_tokens> counts(4);
  const auto shape = [&](index_t heads, index_t capacity, index_t count_heads) {
    const kept_positions<> kept{{positions.data(), {1, heads, capacity}},
                                {counts.data(), {1, count_heads}}};
    return why_invalid(policy::snapkv{.window = 4}, layer, kept) == nullptr;
  };
  const index_t n = layer.capacity();
  CHECK(shape(2, n, 2));
  CHECK(shape(2, n + 5, 2));
  CHECK_FALSE(shape(2, n - 1, 2));
  CHECK_FALSE(shape(1, n, 2));
  CHECK_FALSE(shape(2, n, 1));
}

TEST_CASE("work that no memory holds is refused, not wrapped", "[policy]") {
  float one = 1;
  const auto small = [&](const auto& policy, index_t heads, index_t window, index_t dim,
                         index_t tokens) {
    const dense keys(view(&one, {1, heads, tokens, dim}, {0, 0, 0, 0}));
    const view<const float, 4> queries(&one, {1, window, heads, dim}, {0, 0, 0, 0});
    const auto layer = observe(queries, keys, {.index = 5});
    position_t position = 0;
    kept_tokens count;
    std::vector<std::byte> scratch(1 << 16);
    return select(
        policy, divided<1>(), layer,
        kept_positions<>{{&position, {1, heads, tokens}, {0, 0, 0}}, {&count, {1, heads}, {0, 0}}},
        scratch);
  };
  constexpr index_t most = max_count;
  const auto all = [&](const auto& policy) {
#if !defined(REFREEKV_TEST_EMULATED)  // a device copies no queries: it has room, and would begin
    CHECK(small(policy, 1, most, most, 10) == status::small_workspace);
#endif
    CHECK(small(policy, most, most, most, most) == status::small_workspace);
    CHECK(small(policy, 1, 8, 8, most) == status::small_workspace);
  };
  all(policy::h2o{.window = 8});
  all(policy::snapkv{.window = 8});
  all(policy::snapkv{.window = 8, .head_floor = 0.2});
  all(policy::tova{});
  all(policy::attention_ranked{});
  all(policy::twilight{});
#if !defined(REFREEKV_TEST_EMULATED)
  // A stride-0 observation of which one worker's memory is the largest size there is.
  const dense keys(view(&one, {1, 1, 1, index_t{max_count}}, {0, 0, 0, 0}));
  const view<const float, 4> queries(&one, {1, 1, index_t{max_count}, index_t{max_count}},
                                     {0, 0, 0, 0});
  CHECK(workspace_size(policy::snapkv{.window = 1}, divided<1>(), observe(queries, keys)) >
        std::size_t{1} << 62);
#endif
}
