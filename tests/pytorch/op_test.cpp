// SPDX-License-Identifier: Apache-2.0
// torch.ops.refreekv against the library called directly, on tensors of any type and strides.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <map>
#include <refreekv/attention/observe.hpp>
#include <refreekv/attention/valued_layer.hpp>
#include <refreekv/compact.hpp>
#include <refreekv/cpu/backend.hpp>
#include <refreekv/policy/all.hpp>
#include <refreekv/select.hpp>

#undef CHECK  // torch's, which aborts
#include "catch.hpp"

using namespace refreekv;
using Catch::Matchers::Contains;

namespace {

using named = std::map<std::string, c10::IValue>;

c10::OperatorHandle handle(const std::string& name, const char* overload = "") {
  static void* const library = dlopen(REFREEKV_TORCH_LIBRARY, RTLD_NOW);
  if (library == nullptr) throw std::runtime_error(dlerror());
  return c10::Dispatcher::singleton().findSchemaOrThrow(("refreekv::" + name).c_str(), overload);
}

/// Calls an operator as Python does: arguments by name, the others are their defaults.
std::vector<at::Tensor> call(const c10::OperatorHandle& op, named given) {
  std::vector<c10::IValue> stack;
  for (const c10::Argument& argument : op.schema().arguments()) {
    const auto found = given.find(argument.name());
    stack.push_back(found != given.end() ? found->second : argument.default_value().value());
    if (found != given.end()) given.erase(found);
  }
  if (!given.empty()) throw std::runtime_error("no argument is named " + given.begin()->first);
  op.callBoxed(&stack);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& each : stack) tensors.push_back(each.toTensor());
  return tensors;
}

struct options {
  int64_t layer = 9;
  double threshold = 0.2;
  int64_t sinks = 4;
  std::string average = "mean", norm = "candidates", scope = "layer";
  int64_t full_layers = 2;
  double scale = 0;
};

at::Tensor select(const at::Tensor& queries, const at::Tensor& keys, const options& o = {}) {
  return handle("select")
      .typed<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, double, int64_t, std::string,
                        std::string, std::string, int64_t, double)>()
      .call(queries, keys, o.layer, o.threshold, o.sinks, o.average, o.norm, o.scope, o.full_layers,
            o.scale);
}

void compact(std::vector<at::Tensor> caches, const at::Tensor& kept) {
  handle("compact_").typed<void(at::TensorList, const at::Tensor&)>().call(caches, kept);
}

template <class T, std::size_t Rank = 4>
view<T, Rank> plain(const at::Tensor& t) {
  REQUIRE(t.is_contiguous());
  return [&]<std::size_t... Axis>(std::index_sequence<Axis...>) {
    return view<T, Rank>(static_cast<T*>(t.data_ptr()), {t.size(Axis)...});
  }(std::make_index_sequence<Rank>{});
}

/// Calls f(T()) with the library's type of a tensor's elements.
template <class F>
auto with_type(const at::Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return f(float{});
    case at::kBFloat16: return f(bf16_bits{});
    default: return f(f16_bits{});
  }
}

template <class Policy, class Layer, class Kept>
void decide(const Policy& policy, const Layer& layer, const Kept& kept) {
  std::vector<std::byte> scratch(workspace_size(policy, cpu_backend(), layer));
  REQUIRE(refreekv::select(policy, cpu_backend(), layer, kept, scratch) == status::ok);
}

/// The numbers of the ranges that the library decides on, as `select` returns them.
template <class Policy, class Layer>
std::vector<int> ranges_of(const Policy& policy, const Layer& layer) {
  const index_t groups = groups_of(policy, layer);
  std::vector<kept_range> kept(static_cast<std::size_t>(layer.sequences() * groups));
  decide(policy, layer, kept_ranges<>(kept.data(), {layer.sequences(), groups}));
  std::vector<int> numbers;
  for (const kept_range& each : kept) {
    numbers.insert(numbers.end(), {each.sinks, each.cut, each.tokens});
  }
  return numbers;
}

/// What the library says of the same numbers in plain arrays.
std::vector<int> direct(const at::Tensor& queries, const at::Tensor& keys, const options& o) {
  const auto q = queries.to(at::kFloat).transpose(1, 2).contiguous(), k = keys.contiguous();
  const policy::refreekv policy{
      .threshold = o.threshold,
      .sinks = static_cast<count_t>(o.sinks),
      .window = static_cast<count_t>(queries.size(2)),
      .average = o.average == "mean" ? row_average::mean : row_average::frobenius,
      .norm = o.norm == "candidates" ? norm_scope::candidates : norm_scope::full_row,
      .scope = o.scope == "layer" ? cut_scope::layer : cut_scope::kv_head,
      .full_layers = static_cast<count_t>(o.full_layers)};
  const layer_info<> info{.index = o.layer, .attention = {.scale = static_cast<float>(o.scale)}};
  return with_type(keys, [&]<class T>(T) {
    return ranges_of(policy, observe(plain<const float>(q), dense(plain<const T>(k)), info));
  });
}

std::vector<int> numbers_of(const at::Tensor& kept) {
  const int* first = kept.data_ptr<int>();
  return {first, first + kept.numel()};
}

constexpr int64_t batch = 2, q_heads = 6, kv_heads = 2, tokens = 700, head_dim = 16;

at::Tensor random_queries(int64_t rows = 3) {
  return 2 * at::randn({batch, q_heads, rows, head_dim});
}
at::Tensor random_keys() { return at::randn({batch, kv_heads, tokens, head_dim}); }

constexpr int64_t layer_index = 5, layers = 12, window = 3;

/// A policy that drops some of `tokens` tokens.
template <class Policy>
Policy made_small() {
  Policy policy;
  if constexpr (requires { policy.budget; }) policy.budget = 40;
  if constexpr (requires { policy.recent = 3u; }) policy.recent = 3u;
  if constexpr (requires { policy.window; }) policy.window = window;
  if constexpr (requires { policy.layers; }) policy.layers = layers;
  if constexpr (requires { policy.threshold; }) policy.threshold = 0.2;
  if constexpr (requires { policy.tolerance; }) policy.tolerance = 0.4;
  return policy;
}

template <class Policy>
constexpr bool keeps_ranges = std::same_as<decision_of<Policy, host_memory>, kept_ranges<>>;
template <class Policy>
constexpr bool writes_stand_ins =
    requires(decision_of<Policy, host_memory> kept) { kept.stand_ins; };
template <class Policy>
constexpr bool reads_values = std::same_as<Policy, policy::faithful>;
template <class Policy>
constexpr bool has_state = std::same_as<Policy, policy::cake>;

c10::IValue value_of(double value) { return value; }
c10::IValue value_of(count_t value) { return int64_t{value}; }
c10::IValue value_of(bool value) { return value; }
c10::IValue value_of(const token_budget& value) {
  if (value.is_share()) return value.amount();
  return static_cast<int64_t>(value.amount());
}
template <class Enumeration>
  requires std::is_enum_v<Enumeration>
c10::IValue value_of(Enumeration value) {
  for (const auto& choice : choices_of(value)) {
    if (choice.value == value) return std::string(choice.name);
  }
  return {};
}

/// A policy's options as arguments.
template <class Policy>
named arguments_of(const Policy& policy) {
  named given;
  for_each_option<Policy>([&](const auto& option) {
    const auto& value = policy.*option.member;
    if constexpr (requires { value.width; }) {
      given[option.name] = value_of(value.kind);
      given[std::string(option.name) + "_width"] = value_of(value.width);
    } else {
      given[option.name] = value_of(value);
    }
  });
  return given;
}

/// The tensors of a layer, and what the policies with state write.
struct tensors {
  at::Tensor queries, keys, values, scores, preferences;

  explicit tensors(at::ScalarType type)
      : queries(random_queries(window).to(type)),
        keys(random_keys().to(type)),
        values(at::randn({batch, kv_heads, tokens, head_dim / 2}).to(type)),
        scores(at::zeros({batch, kv_heads, tokens})),
        preferences(at::full({batch, layers}, 1000, at::kDouble)) {}

  /// The same, without the strides and the state of these.
  tensors copy() const {
    tensors other = *this;
    for (at::Tensor* each : {&other.keys, &other.values, &other.scores, &other.preferences}) {
      *each = each->clone(at::MemoryFormat::Contiguous);
    }
    return other;
  }
};

/// Calls the operator of a policy with the arguments that it has.
template <class Policy>
std::vector<at::Tensor> select_by(const tensors& t, named given, int64_t layer = layer_index) {
  given.insert({{"queries", t.queries}, {"keys", t.keys}, {"layer", layer}});
  if constexpr (reads_values<Policy>) given.insert({"values", t.values});
  if constexpr (has_state<Policy>) {
    given.insert({{"scores", t.scores}, {"preferences", t.preferences}});
  }
  return call(handle(std::string("select_") + Policy::name), given);
}

/// What the library decides on, with memory of its own. Writes to the state.
template <class Policy>
struct library_decision {
  std::vector<int> ranges;
  std::vector<position_t> positions;
  std::vector<kept_tokens> counts;
  std::vector<float> keys, values;
  std::vector<position_t> stand_ins;
  index_t most = 0;

  library_decision(const Policy& policy, tensors& t, layer_info<> info = {.index = layer_index}) {
    const auto q = t.queries.to(at::kFloat).transpose(1, 2).contiguous();
    with_type(t.keys, [&]<class T>(T) {
      const auto layer = observe(plain<const float>(q), dense(plain<const T>(t.keys)), info);
      if constexpr (reads_values<Policy>) {
        select(policy, with_values(layer, dense(plain<const T>(t.values))));
      } else if constexpr (has_state<Policy>) {
        select(policy, with_layers(layer, {.scores = plain<float, 3>(t.scores),
                                           .preferences = plain<double, 2>(t.preferences),
                                           .finished = layer_index + 1}));
      } else {
        select(policy, layer);
      }
    });
  }

  template <class Layer>
  void select(const Policy& policy, const Layer& layer) {
    if constexpr (keeps_ranges<Policy>) {
      ranges = ranges_of(policy, layer);
    } else {
      positions.resize(batch * kv_heads * tokens);
      counts.resize(batch * kv_heads);
      if constexpr (writes_stand_ins<Policy>) {
        most = policy.most_stand_ins(tokens);
        keys.resize(static_cast<std::size_t>(batch * kv_heads * most * head_dim));
        values.resize(static_cast<std::size_t>(batch * kv_heads * most * head_dim / 2));
        stand_ins.resize(batch * kv_heads);
      }
      decide(policy, layer, kept());
    }
  }

  decision_of<Policy, host_memory> kept() {
    const kept_positions<> tokens_alone{{positions.data(), {batch, kv_heads, tokens}},
                                        {counts.data(), {batch, kv_heads}}};
    if constexpr (writes_stand_ins<Policy>) {
      return {tokens_alone,
              {{keys.data(), {batch, kv_heads, most, head_dim}},
               {values.data(), {batch, kv_heads, most, head_dim / 2}},
               {stand_ins.data(), {batch, kv_heads}}}};
    } else {
      return tokens_alone;
    }
  }
};

/// Requires that an operator's tensors are what the library decided on.
template <class Policy>
void check_equal(const std::vector<at::Tensor>& got, const library_decision<Policy>& expected) {
  if constexpr (keeps_ranges<Policy>) {
    REQUIRE(got.size() == 1);
    CHECK(numbers_of(got[0]) == expected.ranges);
    CHECK((got[0].select(2, 1) > got[0].select(2, 0)).any().item<bool>());
  } else {
    REQUIRE(got.size() == (writes_stand_ins<Policy> ? 5 : 2));
    REQUIRE(got[0].sizes() == at::IntArrayRef{batch, kv_heads, tokens});
    REQUIRE(got[1].sizes() == at::IntArrayRef{batch, kv_heads});
    bool drops = false;
    for (std::size_t head = 0; head < expected.counts.size(); ++head) {
      const position_t count = expected.counts[head].count;
      CHECK(got[1].data_ptr<int>()[head] == count);
      const int* row = got[0].data_ptr<int>() + head * tokens;
      CHECK(std::equal(row, row + count, expected.positions.data() + head * tokens));
      CHECK(std::all_of(row + count, row + tokens, [](int entry) { return entry == -1; }));
      drops = drops || count < tokens;
      if constexpr (writes_stand_ins<Policy>) {
        const auto rows = static_cast<std::size_t>(expected.most);
        CHECK(got[4].data_ptr<int>()[head] == expected.stand_ins[head]);
        const auto written = static_cast<std::size_t>(expected.stand_ins[head]);
        for (const auto& [tensor, own, dim] :
             {std::tuple{got[2], &expected.keys, std::size_t{head_dim}},
              std::tuple{got[3], &expected.values, std::size_t{head_dim / 2}}}) {
          const float* first = tensor.template data_ptr<float>() + head * rows * dim;
          CHECK(std::equal(first, first + written * dim, own->data() + head * rows * dim));
        }
      }
    }
    CHECK(drops);
  }
}

template <class F>
void for_each_policy(const F& f) {
  std::apply(
      [&]<class... Policy>(const Policy&...) {
        const auto with = [&]<class Each>() {
          INFO(Each::name);
          f.template operator()<Each>();
        };
        (with.template operator()<Policy>(), ...);
      },
      all_policies{});
}

}  // namespace

TEST_CASE("the op decides as the library does") {
  at::manual_seed(7);
  const auto type = GENERATE(at::kFloat, at::kBFloat16, at::kHalf);
  const auto layout = GENERATE(0, 1, 2, 3);
  CAPTURE(type, layout);
  at::Tensor queries = random_queries().to(type), keys = random_keys().to(type);
  if (layout == 1) {  // token-major, as a projection leaves them
    queries = queries.transpose(1, 2).contiguous().transpose(1, 2);
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2);
  } else if (layout == 2) {  // every other token and element of something larger
    keys = at::randn({batch, kv_heads, 2 * tokens, 2 * head_dim})
               .to(type)
               .slice(2, 0, 2 * tokens, 2)
               .slice(3, 1, 2 * head_dim, 2);
  } else if (layout == 3) {  // one KV head that stands for all
    keys = keys.slice(1, 0, 1).expand({batch, kv_heads, tokens, head_dim});
  }
  REQUIRE(keys.is_contiguous() == (layout == 0));

  const auto o = GENERATE(options{}, options{.sinks = 0, .average = "frobenius", .scale = 0.5},
                          options{.norm = "full_row", .scope = "kv_head"}, options{.layer = 1});
  const auto kept = select(queries, keys, o);
  CHECK(kept.size(0) == batch);
  CHECK(kept.size(1) == (o.scope == "layer" ? 1 : kv_heads));
  CHECK(numbers_of(kept) == direct(queries, keys, o));
  const bool drops = (kept.select(2, 1) > o.sinks).any().item<bool>();
  CHECK(drops == (o.layer >= o.full_layers));  // the data is such that there is something to decide

  const int threads = at::get_num_threads();
  at::set_num_threads(3);
  CHECK(at::equal(select(queries, keys, o), kept));
  at::set_num_threads(threads);
}

TEST_CASE("every policy's operator decides as the library does") {
  at::manual_seed(9);
  const auto type = GENERATE(at::kFloat, at::kBFloat16);
  for_each_policy([&]<class Policy>() {
    tensors own(type), passed = own.copy();
    passed.keys = passed.keys.transpose(1, 2).contiguous().transpose(1, 2);
    passed.values = passed.values.transpose(2, 3).contiguous().transpose(2, 3);
    passed.scores = passed.scores.transpose(1, 2).contiguous().transpose(1, 2);
    const Policy policy = made_small<Policy>();
    const library_decision<Policy> expected(policy, own);
    check_equal<Policy>(select_by<Policy>(passed, arguments_of(policy)), expected);
    if constexpr (has_state<Policy>) {
      CHECK(at::equal(passed.scores, own.scores));
      CHECK(at::equal(passed.preferences, own.preferences));
      CHECK((own.preferences != 1000).any().template item<bool>());
    }
  });
}

TEST_CASE("each option reaches the policy") {
  at::manual_seed(10);
  tensors own(at::kFloat), passed = own.copy();
  const auto equal = [&]<class Policy>(const Policy& policy, named given) {
    check_equal<Policy>(select_by<Policy>(passed, std::move(given)),
                        library_decision<Policy>(policy, own));
  };
  equal(policy::snapkv{.budget = token_budget::share(0.25),
                       .window = 2,
                       .pool = {pool_kind::max, 7},
                       .head_floor = 0.2},
        {{"budget", 0.25}, {"window", 2}, {"pool", "max"}, {"pool_width", 7}, {"head_floor", 0.2}});
  equal(policy::h2o{.budget = 50, .recent = token_budget::share(0.1)},
        {{"budget", 50}, {"recent", 0.1}});
  equal(policy::pyramidkv{.budget = 60, .layers = 8, .step = policy::pyramid_step::exact},
        {{"budget", 60}, {"layers", 8}, {"step", "exact"}});
  equal(policy::faithful{.tolerance = 0.5, .stand_ins = false, .scope = cut_scope::layer},
        {{"tolerance", 0.5}, {"stand_ins", false}, {"scope", "layer"}});
  equal(policy::refreekv{.threshold = 0.3}, {{"threshold", 0.3}});
}

TEST_CASE("a schema has each option of its policy, with its default") {
  for_each_policy([]<class Policy>() {
    const c10::OperatorHandle op = handle(std::string("select_") + Policy::name);
    std::size_t others = 0;
    const named defaults = arguments_of(Policy{});
    for (const c10::Argument& argument : op.schema().arguments()) {
      const auto found = defaults.find(argument.name());
      if (found == defaults.end()) {
        ++others;
        continue;
      }
      INFO(argument.name());
      CHECK(argument.kwarg_only());
      REQUIRE(argument.default_value());
      CHECK(*argument.default_value() == found->second);
      CHECK(argument.default_value()->tagKind() == found->second.tagKind());
    }
    CHECK(op.schema().arguments().size() == others + defaults.size());
    CHECK(others == (reads_values<Policy> ? 5 : has_state<Policy> ? 8 : 4));
  });
}

TEST_CASE("an option outside its range is refused by its name") {
  const tensors t(at::kFloat);
  const tensors meta_tensors = [&] {
    tensors meta = t;
    for (at::Tensor* each :
         {&meta.queries, &meta.keys, &meta.values, &meta.scores, &meta.preferences}) {
      *each = each->to(at::kMeta);
    }
    return meta;
  }();
  const c10::InferenceMode inference;  // torch 1.13 has no fallback for gradients of Meta tensors
  for_each_policy([&]<class Policy>() {
    const auto refused = [&](const std::string& argument, c10::IValue value,
                             const std::string& name) {
      INFO(argument);
      for (const tensors* each : {&t, &meta_tensors}) {
        CHECK_THROWS_WITH(select_by<Policy>(*each, {{argument, value}}),
                          Contains("refreekv: " + name + " must be"));
      }
    };
    for_each_option<Policy>([&](const auto& option) {
      using type = std::remove_cvref_t<decltype(std::declval<Policy>().*option.member)>;
      const std::string name = option.name;
      if constexpr (std::same_as<type, double>) {
        refused(name, -1.0, name);
        refused(name, std::nan(""), name);
      } else if constexpr (std::same_as<type, count_t>) {
        refused(name, -1, name);
        refused(name, int64_t{1} << 32, name);
      } else if constexpr (std::same_as<type, token_budget>) {
        refused(name, -1, name);
        refused(name, 1.5, name);
        refused(name, true, name);
      } else if constexpr (std::same_as<type, pooling>) {
        refused(name, "none", name);
        refused(name + "_width", 4, name + ".width");
      } else if constexpr (std::is_enum_v<type>) {
        refused(name, "none", name);
      }
    });
  });
}

TEST_CASE("cake's earlier layers drop more as later ones are prefilled") {
  at::manual_seed(11);
  const policy::cake policy{.budget = 100, .window = window, .layers = 3};
  tensors own(at::kFloat);
  own.preferences = at::zeros({batch, 3}, at::kDouble);
  std::vector<tensors> passed;
  for (int64_t layer = 0; layer < 3; ++layer) {
    tensors next(at::kFloat);
    next.preferences = own.preferences;
    const auto kept = select_by<policy::cake>(next, arguments_of(policy), layer);
    CHECK((own.preferences.select(1, layer) > 0).all().item<bool>());
    CHECK((kept[1] < tokens).all().item<bool>());
    passed.push_back(next);
  }
  tensors& first = passed[0];
  named given = arguments_of(policy);
  given.insert({{"finished", 3}, {"queries", c10::IValue()}});
  given.insert({"prompts", at::full({batch}, tokens, at::kInt)});
  const auto now = select_by<policy::cake>(first, given, 0);

  std::vector<position_t> positions(batch * kv_heads * tokens);
  std::vector<kept_tokens> counts(batch * kv_heads);
  const auto layer = with_layers(observe(dense(plain<const float>(first.keys)), {.index = 0}),
                                 {.scores = plain<float, 3>(first.scores),
                                  .preferences = plain<double, 2>(first.preferences),
                                  .finished = 3});
  decide(policy, layer,
         kept_positions<>{{positions.data(), {batch, kv_heads, tokens}},
                          {counts.data(), {batch, kv_heads}}});
  for (std::size_t head = 0; head < counts.size(); ++head) {
    const int* row = now[0].data_ptr<int>() + head * tokens;
    REQUIRE(now[1].data_ptr<int>()[head] == counts[head].count);
    CHECK(std::equal(row, row + counts[head].count, positions.data() + head * tokens));
  }

  given["finished"] = 0;
  CHECK_THROWS_WITH(select_by<policy::cake>(first, given, 0), Contains("finished counts"));
  first.scores = first.scores.to(at::kDouble);
  CHECK_THROWS_WITH(select_by<policy::cake>(first, given, 0), Contains("scores must be Float"));
}

TEST_CASE("compact_ of positions is the library's") {
  at::manual_seed(12);
  const auto type = GENERATE(at::kFloat, at::kBFloat16, at::kHalf);
  for_each_policy([&]<class Policy>() {
    if constexpr (!keeps_ranges<Policy>) {
      tensors own(type), passed = own.copy();
      library_decision<Policy> expected(made_small<Policy>(), own);
      const auto kept = select_by<Policy>(passed, arguments_of(made_small<Policy>()));
      constexpr auto mode = compaction::suffix_down;
      with_type(own.keys, [&]<class T>(T) {
        REQUIRE(refreekv::compact(cpu_backend(), expected.kept(), mode, dense(plain<T>(own.keys)),
                                  dense(plain<T>(own.values))) == status::ok);
      });
      if constexpr (writes_stand_ins<Policy>) {
        call(handle("compact_", "stand_ins"), {{"keys", passed.keys},
                                               {"values", passed.values},
                                               {"positions", kept[0]},
                                               {"counts", kept[1]},
                                               {"stand_in_keys", kept[2]},
                                               {"stand_in_values", kept[3]},
                                               {"stand_in_counts", kept[4]}});
      } else {
        call(handle("compact_", "positions"),
             {{"caches", std::vector<at::Tensor>{passed.keys, passed.values}},
              {"positions", kept[0]},
              {"counts", kept[1]}});
      }
      CHECK(at::equal(passed.keys, own.keys));
      CHECK(at::equal(passed.values, own.values));
    }
  });
}

TEST_CASE("positions that do not fit a cache are refused before any cache is touched") {
  const at::Tensor keys = random_keys(), values = random_keys(), before = keys.clone();
  const auto kept =
      call(handle("select_snapkv"),
           {{"queries", random_queries()}, {"keys", keys}, {"layer", -1}, {"budget", 40}});
  const auto refused = [&](const char* why, std::vector<at::Tensor> caches, at::Tensor positions,
                           at::Tensor counts) {
    CHECK_THROWS_WITH(call(handle("compact_", "positions"),
                           {{"caches", caches}, {"positions", positions}, {"counts", counts}}),
                      Contains(why));
    CHECK(at::equal(keys, before));
  };
  refused("another number of tokens", {keys, values.slice(2, 1)}, kept[0], kept[1]);
  refused("must ascend", {keys}, kept[0].flip(2), kept[1]);
  refused("must ascend", {keys}, kept[0], kept[1] + 1);
  refused("positions must be Int", {keys}, kept[0].to(at::kLong), kept[1]);
  refused("counts must be Int", {keys}, kept[0], kept[1].unsqueeze(2));
  refused("counts must be [sequence, kv_head]", {keys}, kept[0], kept[1].slice(0, 0, 1));
}

TEST_CASE("compact_ moves the sinks up, in place") {
  at::manual_seed(8);
  const auto type = GENERATE(at::kFloat, at::kBFloat16, at::kHalf);
  const bool token_major = GENERATE(false, true);
  const options o{.scope = GENERATE("layer", "kv_head")};
  at::Tensor keys = random_keys().to(type), values = random_keys().to(type);
  if (token_major) keys = keys.transpose(1, 2).contiguous().transpose(1, 2);
  const auto kept = select(random_queries(), keys, o);
  const auto keys_before = keys.clone(), values_before = values.clone();
  compact({keys, values}, kept);
  for (int64_t s = 0; s < batch; ++s) {
    for (int64_t h = 0; h < kv_heads; ++h) {
      const auto range = kept[s][o.scope == "layer" ? 0 : h];
      const auto sinks = range[0].item<int64_t>(), cut = range[1].item<int64_t>();
      for (const auto& [now, before] : {std::pair{keys, keys_before}, {values, values_before}}) {
        const auto stays = now[s][h].narrow(0, cut - sinks, sinks + tokens - cut);
        CHECK(at::equal(stays,
                        at::cat({before[s][h].slice(0, 0, sinks), before[s][h].slice(0, cut)})));
        CHECK(stays.is_alias_of(now));
      }
    }
  }
}

TEST_CASE("what is wrong is said in the library's words") {
  const auto queries = random_queries(), keys = random_keys();
  const auto refused = [&](const char* why, const options& o) {
    CHECK_THROWS_WITH(select(queries, keys, o), Contains(why));
  };
  refused("threshold must be in [0, 1]", {.threshold = 1.5});
  refused("sinks must be >= 0", {.sinks = -1});
  refused("sinks must be >= 0", {.sinks = (int64_t{1} << 32) + 4});
  refused("full_layers must be >= 0", {.full_layers = -2});
  refused("index is not set", {.layer = -1});
  refused("index must be >= 0", {.layer = -2});
  refused("scale must be finite", {.scale = -1});
  refused("average must be mean or frobenius, not median", {.average = "median"});
  refused("norm must be candidates or full_row, not l1", {.norm = "l1"});
  refused("scope must be layer or kv_head, not head", {.scope = "head"});

  CHECK_THROWS_WITH(select(random_queries(0), keys), Contains("window must be >= 1"));
  CHECK_THROWS_WITH(select(queries.slice(0, 0, 1), keys), Contains("differ in sequences"));
  CHECK_THROWS_WITH(select(queries.slice(3, 0, 8), keys), Contains("differ in head_dim"));
  CHECK_THROWS_WITH(select(queries.slice(1, 0, 5), keys), Contains("multiple of kv_heads"));
  CHECK_THROWS_WITH(select(queries[0], keys), Contains("queries must be [batch, q_head"));
  CHECK_THROWS_WITH(select(queries, keys[0]), Contains("keys must be [batch, kv_head"));
  CHECK_THROWS_WITH(select(queries, keys.to(at::kDouble)),
                    Contains("float32, bfloat16 or float16"));
  CHECK_THROWS_WITH(select(queries.to(at::kInt), keys), Contains("queries must be floats"));

  const auto kept = select(queries, keys);
  CHECK_THROWS_WITH(compact({keys.slice(2, 1)}, kept), Contains("another number of tokens"));
  CHECK_THROWS_WITH(compact({keys}, kept.to(at::kLong)), Contains("kept must be int32"));
  CHECK_THROWS_WITH(compact({keys.slice(1, 0, 1).expand_as(keys)}, kept),
                    Contains("single memory"));
}

TEST_CASE("shapes are known without data") {
  const c10::InferenceMode inference;  // torch 1.13 has no fallback for gradients of Meta tensors
  const auto meta = [](const at::Tensor& t) { return t.to(at::kMeta); };
  const auto queries = random_queries(), keys = random_keys();
  for (const options& o : {options{}, options{.scope = "kv_head"}}) {
    CHECK(select(meta(queries), meta(keys), o).sizes() == select(queries, keys, o).sizes());
  }
  for_each_policy([&]<class Policy>() {
    const tensors t(at::kBFloat16);
    tensors without = t;
    for (at::Tensor* each : {&without.queries, &without.keys, &without.values, &without.scores,
                             &without.preferences}) {
      *each = meta(*each);
    }
    const auto expected = select_by<Policy>(t, {}), got = select_by<Policy>(without, {});
    REQUIRE(got.size() == expected.size());
    for (std::size_t i = 0; i < got.size(); ++i) {
      CHECK(got[i].is_meta());
      CHECK(got[i].sizes() == expected[i].sizes());
      CHECK(got[i].scalar_type() == expected[i].scalar_type());
    }
  });
}
