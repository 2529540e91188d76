// SPDX-License-Identifier: Apache-2.0
// Every option outside its range and every unsuitable layer is an error that names it.
#include <fstream>
#include <iterator>
#include <tuple>

#include "layouts.hpp"
#include "ranked_selection.hpp"

using namespace refreekv;

namespace {

constexpr count_t wrapped = static_cast<count_t>(-1);

/// Returns the first word of the error, or "". Checks that select returns an error if there is one.
template <class Policy, class Layer>
std::string why(const Policy& policy, const Layer& layer) {
  guarded_positions guarded(layer.sequences(), layer.kv_heads(), layer.capacity());
  const char* reason = why_invalid(policy, layer, guarded.kept());
  std::vector<std::byte> scratch(1 << 20);
  const status s = select(policy, divided<1>(), layer, guarded.kept(), scratch);
  CHECK(s == (reason == nullptr ? status::ok : status::invalid_argument));
  CHECK((workspace_size(policy, divided<1>(), layer) == 0) ==
        (why_invalid(policy) != nullptr || layer.invalid() != nullptr));
  const std::string text = reason == nullptr ? "" : reason;
  return text.substr(0, text.find(' '));
}

template <class F>
void for_each_policy_type(const F& f) {
  std::apply([&](const auto&... each) { (f(each), ...); }, all_policies{});
  f(policy::cake_decode{});
}

/// Converts to the type of any member.
struct anything {
  template <class T>
  operator T() const;
};

/// Returns the number of members of an aggregate.
template <class T, class... Given>
consteval std::size_t members() {
  if constexpr (requires { T{Given{}..., anything{}}; }) {
    return members<T, Given..., anything>();
  } else {
    return sizeof...(Given);
  }
}

/// Values of an option, and whether they are allowed.
template <class Policy>
std::vector<std::pair<double, bool>> values_of(const option<Policy, double>& of) {
  const auto& [low, high, words, above_low] = of.range;
  return {{low, !above_low},
          {above_low ? 1e-30 : low, true},
          {high, true},
          {std::nextafter(low, -HUGE_VAL), false},
          {high < HUGE_VAL ? std::nextafter(high, HUGE_VAL) : std::nan(""), false},
          {std::nan(""), false}};
}
template <class Policy>
std::vector<std::pair<count_t, bool>> values_of(const option<Policy, count_t>& of) {
  const auto low = static_cast<count_t>(of.range.low), high = static_cast<count_t>(of.range.high);
  return {{low, true}, {high, true}, {low - 1, false}, {high + 1, false}, {wrapped, false}};
}
template <class Policy>
std::vector<std::pair<token_budget, bool>> values_of(const option<Policy, token_budget>&) {
  return {{token_budget(0), true},           {token_budget(max_count), true},
          {token_budget::share(1), true},    {token_budget(-1), false},
          {token_budget::share(1.1), false}, {token_budget::share(std::nan("")), false}};
}
template <class Policy>
std::vector<std::pair<pooling, bool>> values_of(const option<Policy, pooling>&) {
  return {{{pool_kind::max, 1}, true},
          {{pool_kind::average, 7}, true},
          {{pool_kind::average, 0}, false},
          {{pool_kind::max, 4}, false},
          {{pool_kind::max, wrapped}, false}};
}
template <class Policy>
std::vector<std::pair<bool, bool>> values_of(const option<Policy, bool>&) {
  return {{false, true}, {true, true}};
}
template <class Policy, class E>
  requires std::is_enum_v<E>
std::vector<std::pair<E, bool>> values_of(const option<Policy, E>&) {
  std::vector<std::pair<E, bool>> all;
  for (const auto& choice : choices_of(E{})) all.push_back({choice.value, true});
  return all;
}

}  // namespace

TEST_CASE("every option is refused outside its range, by name, and allowed inside", "[policy]") {
  for_each_policy_type([]<class Policy>(Policy) {
    INFO(Policy::name);
    CHECK(why_invalid(Policy{}) == nullptr);
    CHECK(std::tuple_size_v<std::remove_cvref_t<decltype(Policy::options)>> == members<Policy>());
    for_each_option<Policy>([](const auto& option) {
      INFO(option.name);
      for (const auto& [value, allowed] : values_of(option)) {
        Policy policy;
        policy.*option.member = value;
        const char* why = why_invalid(policy);
        CHECK((why == nullptr) == allowed);
        if (why != nullptr) {
          CHECK(std::string(why).starts_with(option.name));
          CHECK(std::string(why).ends_with(option.range.words));
        }
      }
    });
  });
}

TEST_CASE("choices have different names and values", "[policy]") {
  for_each_policy_type([]<class Policy>(Policy) {
    for_each_option<Policy>([](const auto& option) {
      if constexpr (requires(Policy policy) { choices_of(policy.*option.member); }) {
        const auto choices = choices_of(Policy{}.*option.member);
        for (std::size_t i = 0; i < choices.size(); ++i) {
          for (std::size_t k = 0; k < i; ++k) {
            CHECK(std::string(choices[i].name) != choices[k].name);
            CHECK(choices[i].value != choices[k].value);
          }
        }
      }
    });
  });
}

TEST_CASE("the README's table has every policy", "[policy]") {
  std::ifstream file(REFREEKV_README);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  REQUIRE(!text.empty());
  std::apply(
      [&](const auto&... each) {
        for (const std::string name : {each.name...}) {
          INFO(name);
          CHECK(text.find("| [`" + name + "`](include/refreekv/policy/" + name + ".hpp) |") !=
                std::string::npos);
        }
      },
      all_policies{});
}

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
  CHECK(why(pyramidkv{.layers = 9}, layer) == "layer_info::index");  // the layer is the tenth
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
#if !defined(REFREEKV_TEST_EMULATED)  // a device copies no queries: the workspace suffices
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
  // A layer with strides of 0: the scratch of one worker is the largest possible size.
  const dense keys(view(&one, {1, 1, 1, index_t{max_count}}, {0, 0, 0, 0}));
  const view<const float, 4> queries(&one, {1, 1, index_t{max_count}, index_t{max_count}},
                                     {0, 0, 0, 0});
  CHECK(workspace_size(policy::snapkv{.window = 1}, divided<1>(), observe(queries, keys)) >
        std::size_t{1} << 62);
#endif
}
