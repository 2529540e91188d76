// SPDX-License-Identifier: Apache-2.0
// The contract that every policy keeps on every backend: a table of policies, one test a property.
#include "layouts.hpp"
#include "ranked_selection.hpp"
#include "selection.hpp"
#include "valued_selection.hpp"

using namespace refreekv;

namespace {

constexpr count_t layers = 12;

/// What rides on an observation for the policies that have state.
struct state {
  std::vector<float> scores;
  std::vector<double> preferences;
  std::vector<float> values;
  std::vector<position_t> lengths;

  /// Values are made of the keys, so that what happens to these happens to them.
  template <class Layer>
  auto attach(const policy::faithful&, const Layer& layer) {
    constexpr index_t dims = 3;
    const index_t capacity = layer.capacity();
    values.assign(size(layer.sequences() * layer.kv_heads() * capacity * dims), 0.0f);
    lengths.clear();
    const view<float, 4> rows(values.data(), {layer.sequences(), layer.kv_heads(), capacity, dims});
    for (index_t s = 0; s < layer.sequences(); ++s) {
      lengths.push_back(static_cast<position_t>(layer.tokens(s)));
      for (index_t h = 0; h < layer.kv_heads(); ++h) {
        for (index_t t = 0; t < layer.tokens(s); ++t) {
          const auto run = layer.keys.run_at(s, h, t);
          for (index_t d = 0; d < dims; ++d) {
            const float key = to_float(run.data[d * run.dim_stride]);
            rows(s, h, t, d) = std::isnan(key) ? 0 : key;
          }
        }
      }
    }
    return with_values(layer, dense(rows, {lengths.data(), {layer.sequences()}}));
  }
  template <class Layer>
  auto attach(const policy::cake&, const Layer& layer) {
    scores.assign(size(layer.sequences() * layer.kv_heads() * layer.capacity()), 0.0f);
    preferences.assign(size(layer.sequences() * layers), 1000.0);
    return with_layers(
        layer, {.scores = {scores.data(), {layer.sequences(), layer.kv_heads(), layer.capacity()}},
                .preferences = {preferences.data(), {layer.sequences(), layers}},
                .finished = layers});
  }
  auto attach(const auto&, const auto& layer) { return layer; }
};

/// A policy for problems of some hundred tokens and a window of 3.
template <class Policy>
Policy made_small(Policy policy) {
  if constexpr (requires { policy.budget; }) policy.budget = 40;
  if constexpr (requires { policy.window = 3u; }) policy.window = std::min(policy.window, 3u);
  if constexpr (requires { policy.recent = 3u; }) policy.recent = 3u;
  if constexpr (requires { policy.layers; }) policy.layers = layers;
  return policy;
}

/// Every policy, and some again with the options that matter.
template <class F>
void for_each_policy(const F& f) {
  const auto frobenius = row_average::frobenius;
  const pooling most{pool_kind::max, 7};
  std::apply([&](const auto&... each) { (f(each.name, made_small(each)), ...); }, all_policies{});
  f("refreekv, window 3", policy::refreekv{.window = 3});
  f("refreekv, all options", policy::refreekv{.threshold = 0.1,
                                              .window = 3,
                                              .average = frobenius,
                                              .norm = norm_scope::full_row,
                                              .scope = cut_scope::kv_head});
  f("faithful, KV heads of one length",
    policy::faithful{.tolerance = 0.2, .error_term = false, .scope = cut_scope::layer});
  f("faithful, no stand-ins", policy::faithful{.tolerance = 0.3, .window = 2, .stand_ins = false});
  f("streaming_llm, incoming", policy::streaming_llm{.sinks = 2, .budget = 302, .incoming = 100});
  f("h2o, 60", policy::h2o{.budget = 60, .recent = 30, .window = 3});
  f("h2o, shares",
    policy::h2o{
        .budget = token_budget::share(0.5), .recent = token_budget::share(0.1), .window = 2});
  f("snapkv, max", policy::snapkv{.budget = token_budget::share(0.3), .window = 2, .pool = most});
  f("snapkv, shared by KV heads", policy::snapkv{.budget = 50, .window = 3, .head_floor = 0.2});
  f("cake_decode", policy::cake_decode{.budget = 40, .recent = 3});
  f("attention_ranked, 5 %", policy::attention_ranked{.threshold = 0.05, .window = 3, .recent = 3});
  f("twilight, 80 %", policy::twilight{.mass = 0.8});
  f("twilight, sink start", policy::twilight{.mass = 0.8, .sink_start = true});
}

/// Policies with a budget, or recent tokens, that hold all.
template <class F>
void for_each_large_budget(const F& f) {
  std::apply(
      [&](const auto&... each) {
        const auto with_all = [&](auto policy) {
          if constexpr (requires { policy.budget; }) {
            policy.budget = token_budget::share(1);
            f(policy.name, policy);
          }
        };
        (with_all(made_small(each)), ...);
      },
      all_policies{});
  f("h2o, more than there is", policy::h2o{.budget = 4000, .recent = 3, .window = 3});
  f("snapkv, shared by KV heads",
    policy::snapkv{.budget = token_budget::share(1), .window = 3, .head_floor = 0});
  f("cake_decode", policy::cake_decode{.budget = 300, .recent = 3});
  f("attention_ranked", policy::attention_ranked{.window = 3, .recent = 300});
}

/// Whether a policy needs more than a cache to decide.
template <class Policy>
constexpr bool looks_at_attention(const Policy&) {
  return !policy_for<Policy, cpu_backend<>, key_layer<dense<const float>>>;
}

/// First and last tokens that a policy never drops.
struct safe_tokens {
  index_t first, last;
};
template <class Policy>
safe_tokens safe(const Policy&, index_t) {
  return {0, 0};
}
safe_tokens safe(const policy::refreekv& policy, index_t) { return {policy.sinks, 0}; }
safe_tokens safe(const policy::faithful& policy, index_t n) {
  return {policy.sinks, std::max<index_t>(1, std::min<index_t>(policy.recent, n / 4))};
}
safe_tokens safe(const policy::streaming_llm& policy, index_t) { return {policy.sinks, 0}; }
safe_tokens safe(const policy::h2o& policy, index_t n) {
  return {0, policy.recent.of(policy.budget.of(n))};
}
safe_tokens safe(const policy::snapkv& policy, index_t) { return {0, policy.window}; }
safe_tokens safe(const policy::pyramidkv& policy, index_t) { return {0, policy.window}; }
safe_tokens safe(const policy::cake& policy, index_t) { return {0, policy.window}; }
safe_tokens safe(const policy::cake_decode& policy, index_t) { return {0, policy.recent}; }
safe_tokens safe(const policy::tova&, index_t) { return {0, 1}; }
safe_tokens safe(const policy::attention_ranked& policy, index_t) { return {0, policy.recent}; }

/// What is kept, whatever form the policy says it in.
struct outcome {
  refreekv::status status;
  index_t groups = 0;
  std::vector<std::vector<position_t>> kept;  // [sequence, group]

  const std::vector<position_t>& at(index_t s, index_t g) const {
    return kept[size(s * groups + g)];
  }
  friend bool operator==(const outcome&, const outcome&) = default;
};

template <class Policy, class Layer>
ranked_selection run_ranking(const Policy& policy, const auto& exec, const Layer& layer,
                             std::size_t missing = 0) {
  if constexpr (std::same_as<Policy, policy::faithful>) {
    return run_valued(policy, exec, layer, missing);
  } else {
    return run_ranked(policy, exec, layer, missing);
  }
}

template <class Policy, class Layer>
outcome run(const Policy& policy, const auto& exec, const Layer& plain, std::size_t missing = 0) {
  state s;
  const auto layer = s.attach(policy, plain);
  if constexpr (std::same_as<decision_of<Policy, host_memory>, kept_ranges<>>) {
    const selection ranges = run_select(policy, exec, layer, missing);
    outcome out{ranges.status, ranges.groups, {}};
    for (const kept_range& k : ranges.kept) {
      out.kept.emplace_back();
      if (out.status != status::ok) continue;
      for (position_t t = 0; t < k.tokens; ++t) {
        if (k.keeps(t)) out.kept.back().push_back(t);
      }
    }
    return out;
  } else {
    const ranked_selection ranked = run_ranking(policy, exec, layer, missing);
    return {ranked.status, layer.kv_heads(), ranked.kept};
  }
}

template <class F>
void for_each_backend(const F& f) {
  f("undivided", divided<1>());
  f("in two", divided<2>());
}

template <class F>
void for_each_case(const F& f) {
  for_each_policy([&](const char* name, const auto& policy) {
    INFO(name);
    for_each_backend([&](const char* backend, const auto& exec) {
      INFO(backend);
      f(policy, exec);
    });
  });
}

problem random_problem(unsigned seed, std::vector<position_t> lengths = {300, 5, 0, 77, 4, 1}) {
  random_source random(seed);
  problem p(2, 3, 16, 3, std::move(lengths));
  fill(p, random);
  return p;
}

outcome ok(outcome o) {
  REQUIRE(o.status == status::ok);
  return o;
}

}  // namespace

TEST_CASE("what is kept are ascending positions, the safe ones among them", "[contract]") {
  const problem p = random_problem(base_seed());
  const dense_cache<float> keys(p.keys);
  for_each_case([&](const auto& policy, const auto& exec) {
    const outcome o = ok(run(policy, exec, observe(p.query_view(), keys.source(), p.info())));
    bool dropped = false;
    for (index_t s = 0; s < p.sequences(); ++s) {
      const index_t n = p.lengths[size(s)];
      const auto [first, last] = safe(policy, n);
      for (index_t g = 0; g < o.groups; ++g) {
        const std::vector<position_t>& kept = o.at(s, g);
        CHECK(std::is_sorted(kept.begin(), kept.end(), std::less_equal<>()));
        if (!kept.empty()) CHECK((kept.front() >= 0 && kept.back() < n));
        for (position_t t = 0; t < n; ++t) {
          if (t >= first && t < n - last) continue;
          CHECK(std::binary_search(kept.begin(), kept.end(), t));
        }
        if (n > 0) CHECK(!kept.empty());
        dropped = dropped || static_cast<index_t>(kept.size()) < n;
      }
    }
    CHECK(dropped);
  });
}

TEST_CASE("a range says how much it loses", "[contract]") {
  const problem p = random_problem(base_seed());
  const dense_cache<float> keys(p.keys);
  for_each_case([&](const auto& policy, const auto& exec) {
    if constexpr (std::same_as<decision_of<decltype(policy), host_memory>, kept_ranges<>>) {
      const selection s =
          run_select(policy, exec, observe(p.query_view(), keys.source(), p.info()));
      for (index_t i = 0; i < p.sequences(); ++i) {
        for (index_t g = 0; g < s.groups; ++g) {
          const kept_range& k = s.at(i, g);
          CHECK(k.tokens == p.lengths[size(i)]);
          CHECK(k.sinks == std::min<index_t>(k.tokens, policy.sinks));
          CHECK(k.loss >= 0);
          if constexpr (requires { policy.threshold; }) {
            CHECK(double{k.loss} <= policy.threshold + 1e-9);
          }
          CHECK(k.dropped_mass >= 0);
          CHECK(k.dropped_mass <= 1.00001f);
        }
      }
    }
  });
}

TEST_CASE("a budget that holds all is the identity", "[contract]") {
  const problem p = random_problem(base_seed() + 1);
  const dense_cache<float> keys(p.keys);
  for_each_large_budget([&](const char* name, const auto& policy) {
    INFO(name);
    for_each_backend([&](const char*, const auto& exec) {
      const outcome o = ok(run(policy, exec, observe(p.query_view(), keys.source(), p.info())));
      for (index_t s = 0; s < p.sequences(); ++s) {
        for (index_t g = 0; g < o.groups; ++g) {
          CHECK(static_cast<position_t>(o.at(s, g).size()) == p.lengths[size(s)]);
        }
      }
    });
  });
}

/// One sequence of a problem.
problem alone(const problem& p, index_t s) {
  problem own(p.keys.kv_heads, p.group, p.head_dim, p.window, {p.lengths[size(s)]});
  own.keys.values[0] = p.keys.values[size(s)];
  const auto begin = p.queries.begin() + s * static_cast<index_t>(own.queries.size());
  std::copy(begin, begin + static_cast<index_t>(own.queries.size()), own.queries.begin());
  return own;
}

TEST_CASE("sequences do not influence each other", "[contract]") {
  const problem p = random_problem(base_seed() + 1);
  const dense_cache<float> keys(p.keys);
  for_each_case([&](const auto& policy, const auto& exec) {
    const outcome together =
        ok(run(policy, exec, observe(p.query_view(), keys.source(), p.info())));
    for (index_t s = 0; s < p.sequences(); ++s) {
      const problem own = alone(p, s);
      const dense_cache<float> own_keys(own.keys);
      const outcome single =
          ok(run(policy, exec, observe(own.query_view(), own_keys.source(), p.info())));
      for (index_t g = 0; g < together.groups; ++g) CHECK(single.at(0, g) == together.at(s, g));
    }
  });
}

TEST_CASE("a long sequence is decided beside many short ones as it is alone", "[contract]") {
  // So many rows and chunks that no device has a block for each: blocks step over chunks.
  constexpr index_t sequences = 33, longest = 11;
  random_source random(base_seed() + 20);
  std::vector<position_t> lengths;
  for (index_t s = 0; s < sequences; ++s) {
    lengths.push_back(static_cast<position_t>(s == longest ? 9000 : random.between(0, 12)));
  }
  problem p(2, 1, 4, 3, lengths);
  fill(p, random);
  const dense_cache<float> keys(p.keys);
  const problem own = alone(p, longest);
  const dense_cache<float> own_keys(own.keys);
  for_each_policy([&](const char* name, const auto& policy) {
    INFO(name);
    const outcome together =
        ok(run(policy, divided<1>(), observe(p.query_view(), keys.source(), p.info())));
    const outcome single =
        ok(run(policy, divided<1>(), observe(own.query_view(), own_keys.source(), p.info())));
    for (index_t g = 0; g < together.groups; ++g) CHECK(single.at(0, g) == together.at(longest, g));
  });
}

TEST_CASE("a batch of different numbers of rows is decided as each sequence with its own rows",
          "[contract]") {
  problem batch = random_problem(base_seed() + 8, {300, 77, 280, 5, 0, 90});
  batch.row_counts = {1, 3, 2, 3, 0, 0};
  std::vector<problem> alone;
  for (index_t s = 0; s < batch.sequences(); ++s) {
    const index_t rows = batch.row_counts[size(s)], missing = batch.window - rows;
    alone.emplace_back(2, 3, 16, rows, std::vector<position_t>{batch.lengths[size(s)]});
    alone.back().keys.values[0] = batch.keys.values[size(s)];
    for (index_t r = 0; r < batch.window; ++r) {
      for (index_t h = 0; h < batch.q_heads(); ++h) {
        for (index_t d = 0; d < batch.head_dim; ++d) {
          if (r < missing)
            batch.query(s, r, h, d) = std::numeric_limits<float>::quiet_NaN();
          else
            alone.back().query(0, r - missing, h, d) = batch.query(s, r, h, d);
        }
      }
    }
  }
  const dense_cache<float> keys(batch.keys);
  for_each_case([&](const auto& policy, const auto& exec) {
    const outcome all =
        ok(run(policy, exec, observe(batch.query_view(), keys.source(), batch.info())));
    for (index_t s = 0; s < batch.sequences(); ++s) {
      INFO("sequence " << s);
      const auto n = size(batch.lengths[size(s)]);
      if (alone[size(s)].window == 0 && n > 0) {  // nothing says what is needed
        const bool looks = looks_at_attention(policy);
        for (index_t g = 0; g < all.groups && looks; ++g) CHECK(all.at(s, g).size() == n);
        continue;
      }
      const dense_cache<float> own(alone[size(s)].keys);
      const outcome one = ok(run(
          policy, exec, observe(alone[size(s)].query_view(), own.source(), alone[size(s)].info())));
      for (index_t g = 0; g < all.groups; ++g) CHECK(all.at(s, g) == one.at(0, g));
    }
  });
}

TEST_CASE("an engine hears that nothing was decided", "[contract]") {
  problem p = random_problem(base_seed() + 9, {300, 280, 3, 0, 250});
  p.row_counts = {3, 3, 3, 3, 0};
  p.keys.at(0, 0, 150, 3) = std::numeric_limits<float>::quiet_NaN();
  const dense_cache<float> keys(p.keys);
  const std::vector<bool> expected{true, false, false, false, true};
  for_each_case([&](const auto& policy, const auto& exec) {
    using policy_type = std::decay_t<decltype(policy)>;
    state s;
    const auto layer = s.attach(policy, observe(p.query_view(), keys.source(), p.info()));
    for (index_t i = 0; i < p.sequences(); ++i) {
      INFO("sequence " << i);
      bool undecided = false;
      if constexpr (std::same_as<decision_of<policy_type, host_memory>, kept_ranges<>>) {
        undecided = run_select(policy, exec, layer).at(i).undecided;
      } else {
        undecided = run_ranking(policy, exec, layer).counts[size(2 * i)].undecided;
      }
      CHECK(undecided == (expected[size(i)] && looks_at_attention(policy)));
    }
  });
}

TEST_CASE("permuting KV heads permutes the result", "[contract]") {
  const problem p = random_problem(base_seed() + 2);
  problem swapped = p;
  for (index_t s = 0; s < p.sequences(); ++s) {
    for (index_t h = 0; h < p.keys.kv_heads; ++h) {
      const index_t other = p.keys.kv_heads - 1 - h;
      for (index_t d = 0; d < p.head_dim; ++d) {
        for (index_t t = 0; t < p.lengths[size(s)]; ++t) {
          swapped.keys.at(s, other, t, d) = p.keys.at(s, h, t, d);
        }
        for (index_t r = 0; r < p.window; ++r) {
          for (index_t g = 0; g < p.group; ++g) {
            swapped.query(s, r, other * p.group + g, d) = p.query(s, r, h * p.group + g, d);
          }
        }
      }
    }
  }
  const dense_cache<float> keys(p.keys), swapped_keys(swapped.keys);
  for_each_case([&](const auto& policy, const auto& exec) {
    const outcome a = ok(run(policy, exec, observe(p.query_view(), keys.source(), p.info())));
    const outcome b =
        ok(run(policy, exec, observe(swapped.query_view(), swapped_keys.source(), swapped.info())));
    for (index_t s = 0; s < p.sequences(); ++s) {
      for (index_t g = 0; g < a.groups; ++g) CHECK(a.at(s, g) == b.at(s, a.groups - 1 - g));
    }
  });
}

TEST_CASE("every run and every division of the work gives the same bits", "[contract]") {
  const problem p = random_problem(base_seed() + 3, {1000, 700});
  const dense_cache<Eigen::half> keys(p.keys);
  for_each_policy([&](const char* name, const auto& policy) {
    INFO(name);
    const auto layer = observe(p.query_view(), keys.source(), p.info());
    const outcome first = ok(run(policy, divided<1>(), layer));
    CHECK(run(policy, divided<1>(), layer) == first);
    CHECK(run(policy, divided<5>(), layer) == first);
  });
}

TEST_CASE("many threads share what is left after the keys were read", "[contract][threads]") {
  // Rows and chunks enough that normalisers, norms and crossings are worth waking workers for.
  const position_t tokens = exhaustive ? 20000 : 1000;
  problem p(8, 2, 4, 64, {tokens, tokens / 2});
  random_source random(base_seed() + 5);
  fill(p, random);
  const dense_cache<Eigen::bfloat16> keys(p.keys);
  const auto layer = observe(p.query_view(), keys.source(), p.info());
  for (const auto average : {row_average::mean, row_average::frobenius}) {
    for (const auto scope : {cut_scope::layer, cut_scope::kv_head}) {
      const policy::refreekv policy{
          .threshold = 0.1, .window = 64, .average = average, .scope = scope};
      const selection one = run_select(policy, divided<1>(), layer);
      const selection seven = run_select(policy, divided<7>(), layer);
      REQUIRE(one.status == status::ok);
      REQUIRE(seven.status == status::ok);
      for (std::size_t i = 0; i < one.kept.size(); ++i) CHECK(one.kept[i] == seven.kept[i]);
    }
  }
}

TEST_CASE("a workspace one byte short is refused and nothing is written", "[contract]") {
  const problem p = random_problem(base_seed() + 4);
  const dense_cache<float> keys(p.keys);
  const auto plain = observe(p.query_view(), keys.source(), p.info());
  int refused = 0;
  for_each_case([&](const auto& policy, const auto& exec) {
    state s;
    if (workspace_size(policy, exec, s.attach(policy, plain)) == 0) {  // cannot be short
      CHECK(!looks_at_attention(policy));
    } else {
      CHECK(run(policy, exec, plain, 1).status == status::small_workspace);
      ++refused;
    }
  });
  CHECK(refused > 0);
}

TEST_CASE("an empty batch is no work", "[contract]") {
  const problem p(2, 2, 8, 3, {});
  const dense_cache<float> keys(p.keys);
  for_each_case([&](const auto& policy, const auto& exec) {
    CHECK(run(policy, exec, observe(p.query_view(), keys.source(), p.info())).status == status::ok);
  });
}

TEST_CASE("NaN in a score keeps all of its sequence", "[contract]") {
  problem p = random_problem(base_seed() + 5, {300, 280});
  p.keys.at(0, 0, 150, 3) = std::numeric_limits<float>::quiet_NaN();
  const dense_cache<float> keys(p.keys);
  for_each_case([&](const auto& policy, const auto& exec) {
    using policy_type = std::decay_t<decltype(policy)>;
    if (looks_at_attention(policy)) {
      const outcome o = ok(run(policy, exec, observe(p.query_view(), keys.source(), p.info())));
      CHECK(o.at(0, 0).size() == 300);  // the head that has it
      // Those of a number of tokens for the whole layer go on together, others on their own.
      if constexpr (!std::same_as<policy_type, policy::twilight>) {
        if (o.groups == 1 || !std::same_as<policy_type, policy::refreekv>) {
          CHECK(o.at(0, o.groups - 1).size() == 300);
        }
      }
      CHECK(o.at(1, 0).size() < 280);
    }
  });
}

TEST_CASE("prune selects and gathers", "[contract]") {
  const problem p = random_problem(base_seed() + 6);
  for_each_case([&](const auto& policy, const auto& exec) {
    using policy_type = std::decay_t<decltype(policy)>;
    if constexpr (std::same_as<decision_of<policy_type, host_memory>, kept_positions<>>) {
      const dense_cache<float> keys(p.keys), values(p.keys);
      const auto plain = observe(p.query_view(), keys.source(), p.info());
      const outcome expected = ok(run(policy, exec, plain));
      state s;
      const auto layer = s.attach(policy, plain);
      std::vector<std::byte> scratch(workspace_size(policy, exec, layer));
      guarded_positions guarded(p.sequences(), 2, layer.capacity());
      const kept_positions<> kept = guarded.kept();
      REQUIRE(prune(policy, exec, layer, kept, scratch, compaction::suffix_down, values.source()) ==
              status::ok);
      for (index_t i = 0; i < p.sequences(); ++i) {
        for (index_t h = 0; h < 2; ++h) {
          REQUIRE(positions_of(kept, i, h) == expected.at(i, h));
          for (index_t k = 0; k < kept.counts(i, h).count; ++k) {
            const index_t from = kept.positions(i, h, k);
            CHECK(*keys.source().run_at(i, h, k).data == p.keys.at(i, h, from, 0));
            CHECK(*values.source().run_at(i, h, k).data == p.keys.at(i, h, from, 0));
          }
        }
      }
    }
  });
}
