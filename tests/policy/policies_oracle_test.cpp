// SPDX-License-Identifier: Apache-2.0
// Compares the policies that rank tokens with the double-precision oracle on random problems.
#include "estimates.hpp"
#include "policy_reference.hpp"
#include "ranked_selection.hpp"

namespace {

constexpr unsigned problems = exhaustive ? affordable(1000) : 250;  // for each policy

namespace policy = refreekv::policy;
using kept_heads = std::vector<std::vector<position_t>>;  // [kv_head]
using reference::attention_rows;
using reference::choice;
using reference::scores;
using refreekv::token_budget;

reference::pool kind_of(const refreekv::pooling& p) {
  return p.kind == refreekv::pool_kind::max ? reference::pool::max : reference::pool::average;
}

std::string disagreement(const kept_heads& kept, const std::vector<choice>& expected) {
  for (std::size_t h = 0; h < kept.size(); ++h) {
    const std::string why = reference::disagreement(kept[h], expected[h]);
    if (!why.empty()) return "KV head " + std::to_string(h) + ": " + why;
  }
  return "";
}

/// Returns a length in tokens, often one near which the decision of a policy changes.
position_t random_length(random_source& random, index_t window, index_t budget) {
  const index_t at = random.one_of({index_t{0}, index_t{1}, window, budget, window + budget,
                                    random.between(2, 60), random.between(20, 140)});
  if (random.chance(0.01)) return static_cast<position_t>(random.between(250, 530));
  return static_cast<position_t>(std::max<index_t>(0, at + random.between(-1, 2)));
}

void add_options(problem& p, random_source& random) {
  const auto some = [&](std::vector<float>& per_head, float low, float high) {
    for (index_t h = 0; h < p.q_heads(); ++h) {
      per_head.push_back(low + (high - low) * static_cast<float>(random.between(0, 100)) / 100);
    }
  };
  if (random.chance(0.2)) p.scale = random.one_of({0.05f, 0.25f, 1.0f});
  if (random.chance(0.1)) p.soft_cap = random.one_of({2.0f, 30.0f});
  if (random.chance(0.1)) p.sliding_window = random.one_of<count_t>({5, 30, 5000});
  if (random.chance(0.1)) some(p.alibi_slopes, 0, 0.5f);
  if (random.chance(0.1)) some(p.sink_logits, -5, 5);
  add_rows(p, random);
}

/// rows: the number of query rows that the policy reads, if there are as many; budget: the number
/// of tokens kept of a long sequence.
problem random_problem(random_source& random, index_t rows, index_t budget) {
  std::vector<position_t> lengths(size(random.between(0, 3)));
  for (position_t& n : lengths) {
    n = random_length(random, std::min<index_t>(rows, 64), std::min<index_t>(budget, 200));
  }
  index_t longest = 1;
  for (const position_t n : lengths) longest = std::max<index_t>(longest, n);
  const index_t window = std::min(rows, longest) + (random.chance(0.2) ? random.between(1, 3) : 0);
  const bool large = longest * window > 5000;
  problem p(large ? 1 : random.one_of<index_t>({1, 2, 3}),
            large ? 3 : random.one_of<index_t>({1, 1, 3, 4, 8}),
            random.one_of<index_t>({1, 8, 16, 20, 32}), window, lengths);
  fill(p, random);
  add_options(p, random);
  return p;
}

/// Writes a NaN to one key of about half of the sequences, so that attention to it is NaN. Removes
/// the sliding window: it is unspecified what attention rows with a NaN give to hidden tokens.
void spoil(problem& p, random_source& random) {
  p.sliding_window = 0;
  for (index_t s = 0; s < p.sequences(); ++s) {
    const index_t n = p.lengths[size(s)];
    if (n == 0 || random.chance(0.5)) continue;
    p.keys.at(s, random.between(0, p.keys.kv_heads - 1), random.between(0, n / 2), 0) =
        std::numeric_limits<float>::quiet_NaN();
  }
}

/// Returns the oracle's attention rows. Tokens that a row does not see have attention 0, even in a
/// row with a NaN.
attention_rows attend(const problem& p, index_t sequence) {
  attention_rows rows = reference::attend(p, sequence);
  for (index_t h = 0; h < rows.q_heads; ++h) {
    for (index_t r = 0; r < rows.window; ++r) {
      for (index_t t = 0; t < rows.tokens; ++t) {
        if (!p.sees(sequence, r, t)) {
          rows.values[size((h * rows.window + r) * rows.tokens + t)] = 0;
        }
      }
    }
  }
  return rows;
}

template <class T, class Cache, class Check>
void observe_as(problem& p, Cache of_keys, index_t layer, const Check& check) {
  const auto cache = any_layout(std::move(of_keys));
  std::vector<T> queries;
  for (const float q : p.queries) queries.push_back(to_element<T>(q));
  const refreekv::view q(queries.data(), {p.sequences(), p.window, p.q_heads(), p.head_dim});
  std::vector<attention_rows> rows;
  for (index_t s = 0; s < p.sequences(); ++s) rows.push_back(attend(p, s));
  check(refreekv::observe(q, cache.source(), p.info(layer)), rows);
  CHECK(cache.untouched());
}

/// Calls check(layer, rows) with ready attention rows in float. The oracle reads the same numbers.
/// With `coarse` they are multiples of 1/32, so that many scores are equal: arithmetic on them is
/// exact. Groups of 3 query heads, whose means are thirds, are not rounded to such multiples.
template <class Check>
void observe_ready(problem& p, index_t layer, bool coarse, const Check& check) {
  std::vector<attention_rows> rows;
  for (index_t s = 0; s < p.sequences(); ++s) {
    rows.push_back(attend(p, s));
    for (double& x : rows.back().values) {
      x = coarse && p.group != 3 ? std::nearbyint(32 * x) / 32 : double{static_cast<float>(x)};
    }
  }
  const row_tensor tensor(rows, p.window);
  check(tensor.layer(p.keys.kv_heads, p.info(layer)), rows);
}

/// Calls check(layer, the oracle's rows) for one random kind of layer. ties: whether scores may be
/// equal.
template <class Check>
void observe_somehow(problem& p, random_source& random, index_t layer, const Check& check,
                     bool ties = true) {
  using half = Eigen::half;
  using bf16 = refreekv::bf16_bits;
  const auto order = random.one_of(
      {axis_order::head_token_dim, axis_order::token_head_dim, axis_order::head_dim_token});
  const index_t page = random.one_of<index_t>({1, 3, 16});
  const index_t way = p.sequences() == 0 ? 0 : random.between(0, ties ? 7 : 6);
  if (way == 2 || way == 3) round_problem<half>(p);
  if (way == 4 || way == 5) round_problem<bf16>(p);
  switch (way) {
    case 0: return observe_as<float>(p, dense_cache<float>(p.keys, order), layer, check);
    case 1: return observe_as<float>(p, segmented_cache<float>(p.keys), layer, check);
    case 2: return observe_as<half>(p, dense_cache<half>(p.keys, order), layer, check);
    case 3: return observe_as<half>(p, paged_cache<half>(p.keys, page), layer, check);
    case 4: return observe_as<bf16>(p, dense_cache<bf16>(p.keys, order), layer, check);
    case 5:
      return observe_as<bf16>(p, paged_cache<bf16, std::int64_t>(p.keys, 64, true, true, false),
                              layer, check);
    default: return observe_ready(p, layer, way == 7, check);
  }
}

/// Compares the decision with the oracle, undivided and in seven parts. disagree(rows, kept
/// [kv_head]) returns the difference, or "".
template <class Policy, class Layer, class Disagree>
void check_selection(const Policy& policy, const Layer& layer,
                     const std::vector<attention_rows>& rows, const Disagree& disagree) {
  const ranked_selection one = run_ranked(policy, divided<1>(), layer);
  REQUIRE(one.status == refreekv::status::ok);
  CHECK(run_ranked(policy, divided<7>(), layer) == one);
  if (refreekv::workspace_size(policy, divided<1>(), layer) > 0) {
    CHECK(run_ranked(policy, divided<1>(), layer, 1).status == refreekv::status::small_workspace);
  }
  for (index_t s = 0; s < layer.sequences(); ++s) {
    INFO("sequence " << s << " of " << rows[size(s)].tokens << " tokens");
    const auto first = one.kept.begin() + s * layer.kv_heads();
    CHECK(disagree(rows[size(s)], kept_heads(first, first + layer.kv_heads())) == "");
  }
}

std::string described(const problem& p) {
  return std::to_string(p.window) + " rows, " + std::to_string(p.keys.kv_heads) + " KV heads of " +
         std::to_string(p.group) + ", dim " + std::to_string(p.head_dim) + ", sliding window " +
         std::to_string(index_t{p.sliding_window}) + ", soft cap " + std::to_string(p.soft_cap) +
         ", " + std::to_string(p.alibi_slopes.size()) + " slopes, " +
         std::to_string(p.sink_logits.size()) + " sinks, " + std::to_string(p.row_counts.size()) +
         " row counts, " + std::to_string(p.row_ends.size()) + " row ends";
}

/// Compares random problems with the oracle. draw(random) returns a `drawn`; disagree(policy,
/// layer, rows, kept [kv_head]) returns the difference, or "".
template <class Draw, class Disagree>
void check_random_problems(const Draw& draw, const Disagree& disagree) {
  const unsigned first = base_seed();
  for (unsigned seed = first; seed < first + problems; ++seed) {
    random_source random(seed);
    const auto [policy, rows, budget, layer] = draw(random);
    problem p = random_problem(random, rows, budget);
    if (random.chance(0.1)) spoil(p, random);
    INFO("REFREEKV_SEED=" << seed << " " << described(p));
    observe_somehow(
        p, random, layer, [&, &r = policy, l = layer](const auto& given, const auto& rows_of) {
          check_selection(r, given, rows_of, [&](const attention_rows& a, const kept_heads& kept) {
            return disagree(r, l, a, kept);
          });
        });
  }
}

/// A policy and the sizes that its random problems need.
template <class Policy>
struct drawn {
  Policy policy;
  index_t rows;        // query rows that the policy reads
  index_t budget = 0;  // in tokens; the decision changes near this length
  index_t layer = 0;
};

count_t random_window(random_source& random) {
  return random.chance(0.1) ? 64
                            : static_cast<count_t>(random.one_of(
                                  {index_t{1}, index_t{2}, index_t{8}, random.between(1, 20)}));
}

token_budget random_budget(random_source& random, index_t least) {
  return random.chance(0.3) ? token_budget::share(random.one_of({0.0, 0.1, 0.5, 0.85, 1.0}))
                            : token_budget(static_cast<count_t>(least + random.between(0, 60)));
}

refreekv::pooling random_pooling(random_source& random) {
  return {random.one_of({refreekv::pool_kind::average, refreekv::pool_kind::max}),
          random.one_of<count_t>({1, 3, 5, 7, 31})};
}

/// Whether two arrays are equal bit by bit, NaN included. Requires equal sizes.
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/// Scores as the caller of h2o owns them: [sequence, kv_head, capacity]. Slots without a score hold
/// NaN.
class carried_scores {
 public:
  carried_scores(const std::vector<attention_rows>& rows, index_t kv_heads, index_t capacity,
                 random_source& random)
      : sequences_(static_cast<index_t>(rows.size())),
        kv_heads_(kv_heads),
        capacity_(capacity + 3),
        values_(size(sequences_ * kv_heads * capacity_), std::numeric_limits<float>::quiet_NaN()) {
    for (index_t s = 0; s < sequences_; ++s) {
      for (index_t h = 0; h < kv_heads; ++h) {
        for (index_t t = 0; t < rows[size(s)].first_new; ++t) {
          view()(s, h, t) = std::abs(random.normal());
        }
      }
    }
  }
  refreekv::view<float, 3> view() { return {values_.data(), {sequences_, kv_heads_, capacity_}}; }
  std::vector<scores> of(index_t sequence, index_t tokens) {
    std::vector<scores> out;
    for (index_t h = 0; h < kv_heads_; ++h) {
      const float* const of_head = view().at(sequence, h);
      out.emplace_back(of_head, of_head + tokens);
    }
    return out;
  }
  bool same_as(const carried_scores& other) const { return same_bits(values_, other.values_); }

 private:
  index_t sequences_, kv_heads_, capacity_;
  std::vector<float> values_;
};

/// Returns the first score of a kept token that differs from the oracle's, or "".
std::string disagreement(const std::vector<scores>& ours, const std::vector<scores>& oracle,
                         const kept_heads& kept) {
  for (std::size_t h = 0; h < kept.size(); ++h) {
    for (const position_t t : kept[h]) {
      const double a = ours[h][size(t)], b = oracle[h][size(t)];
      if (std::isnan(a) != std::isnan(b) || std::abs(a - b) > 1e-5 * (1 + std::abs(b))) {
        return "score of " + std::to_string(t) + ": " + std::to_string(a) + ", oracle " +
               std::to_string(b);
      }
    }
  }
  return "";
}

}  // namespace

TEST_CASE("h2o agrees with the oracle, and so do the scores it carries", "[oracle]") {
  const unsigned first = base_seed();
  for (unsigned seed = first; seed < first + problems; ++seed) {
    random_source random(seed);
    policy::h2o policy;
    policy.recent = random_budget(random, 0);
    policy.budget = random_budget(random, policy.recent.of(40));
    policy.window = random.chance(0.4) ? refreekv::all_queries : random_window(random);
    const bool carries = random.chance(0.5);
    if (carries && policy.budget.is_share()) policy.budget = policy.budget.of(40);
    problem p = random_problem(random, policy.window, policy.budget.of(60));
    if (random.chance(0.1)) spoil(p, random);
    INFO("REFREEKV_SEED=" << seed << " window " << index_t{policy.window} << " " << described(p));
    observe_somehow(p, random, 5, [&](const auto& layer, const auto& rows) {
      const index_t shown = carries ? p.window : std::min<index_t>(policy.window, p.window);
      carried_scores before(rows, layer.kv_heads(), layer.capacity(), random);
      carried_scores after = before, after_seven = before;
      const auto select = [&](const auto& backend, carried_scores& state) {
        return carries ? run_ranked(policy, backend, refreekv::with_scores(layer, state.view()))
                       : run_ranked(policy, backend, layer);
      };
      const ranked_selection one = select(divided<1>(), after);
      REQUIRE(one.status == refreekv::status::ok);
      CHECK(select(divided<7>(), after_seven) == one);
      CHECK(after_seven.same_as(after));
      for (index_t s = 0; s < layer.sequences(); ++s) {
        const index_t n = rows[size(s)].tokens;
        INFO("sequence " << s << " of " << n << " tokens");
        const auto expected = reference::h2o(rows[size(s)], layer.kv_heads(), policy.budget.of(n),
                                             policy.recent.of(policy.budget.of(n)), shown,
                                             carries ? before.of(s, n) : std::vector<scores>{});
        const auto head = one.kept.begin() + s * layer.kv_heads();
        const kept_heads kept(head, head + layer.kv_heads());
        CHECK(disagreement(kept, expected.kept) == "");
        if (carries) CHECK(disagreement(after.of(s, n), expected.sums, kept) == "");
      }
    });
  }
}

TEST_CASE("snapkv agrees with the oracle", "[oracle]") {
  check_random_problems(
      [](random_source& random) {
        const count_t window = random_window(random);
        const token_budget budget = random_budget(random, window);
        return drawn<policy::snapkv>{
            {budget, window, random_pooling(random), random.one_of({1.0, 0.5, 0.2, 0.0})},
            window,
            budget.of(60)};
      },
      [](const policy::snapkv& policy, index_t, const attention_rows& rows,
         const kept_heads& kept) {
        const auto kv_heads = static_cast<index_t>(kept.size());
        return disagreement(
            kept, reference::snapkv(rows, kv_heads, policy.budget.of(rows.tokens), policy.window,
                                    kind_of(policy.pool), policy.pool.width, policy.head_floor));
      });
}

TEST_CASE("pyramidkv agrees with the oracle", "[oracle]") {
  check_random_problems(
      [](random_source& random) {
        const count_t window = random_window(random);
        policy::pyramidkv policy;
        policy.budget = random_budget(random, window);
        policy.window = window;
        policy.pool = random_pooling(random);
        policy.beta = random.one_of<count_t>({1, 2, 4, 20});
        policy.layers = random.one_of<count_t>({1, 2, 3, 32});
        policy.step = random.one_of(
            {policy::pyramid_step::between_layers, policy::pyramid_step::over_layers});
        return drawn<policy::pyramidkv>{policy, window, 2 * policy.budget.of(40),
                                        random.between(0, index_t{policy.layers} - 1)};
      },
      [](const policy::pyramidkv& policy, index_t layer, const attention_rows& rows,
         const kept_heads& kept) {
        const auto kv_heads = static_cast<index_t>(kept.size());
        const auto divisor = policy.step == policy::pyramid_step::over_layers
                                 ? reference::pyramid_divisor::layers
                                 : reference::pyramid_divisor::layers_less_one;
        const auto budget = reference::pyramid_budget(rows.tokens, layer, policy.layers,
                                                      policy.budget.of(rows.tokens), policy.window,
                                                      policy.beta, divisor);
        if (!budget) return disagreement(kept, reference::keep_all_heads(kv_heads, rows.tokens));
        return disagreement(
            kept, reference::snapkv(rows, kv_heads, *budget + policy.window, policy.window,
                                    kind_of(policy.pool), policy.pool.width));
      });
}

TEST_CASE("tova agrees with the oracle", "[oracle]") {
  check_random_problems(
      [](random_source& random) {
        const token_budget budget = random_budget(random, 0);
        return drawn<policy::tova>{{budget}, random.one_of<index_t>({1, 3}), budget.of(60)};
      },
      [](const policy::tova& policy, index_t, const attention_rows& rows, const kept_heads& kept) {
        return disagreement(kept, reference::tova(rows, static_cast<index_t>(kept.size()),
                                                  policy.budget.of(rows.tokens)));
      });
}

TEST_CASE("attention_ranked agrees with the oracle", "[oracle]") {
  check_random_problems(
      [](random_source& random) {
        policy::attention_ranked policy;
        policy.threshold = random.one_of({0.0, 0.001, 0.01, 0.05, 0.3, 0.9, 1.0});
        policy.window = random.chance(0.1) ? refreekv::all_queries : random_window(random);
        policy.recent = random.one_of<count_t>({0, 1, 8, 8, 30});
        return drawn<policy::attention_ranked>{policy, index_t{policy.window},
                                               index_t{policy.recent}, random.between(1, 4)};
      },
      [](const policy::attention_ranked& policy, index_t layer, const attention_rows& rows,
         const kept_heads& kept) -> std::string {
        if (layer < policy.full_layers) {
          return disagreement(
              kept, reference::keep_all_heads(static_cast<index_t>(kept.size()), rows.tokens));
        }
        const auto order =
            reference::attention_ranked(rows, static_cast<index_t>(kept.size()), policy.threshold,
                                        policy.window, policy.recent);
        std::vector<choice> expected;
        for (std::size_t h = 0; h < kept.size(); ++h) {
          if (kept[h].size() != kept[0].size()) return "heads differ in how many they keep";
          expected.push_back(
              order.of(static_cast<index_t>(h), static_cast<index_t>(kept[h].size())));
        }
        return disagreement(kept, expected);
      });
}

TEST_CASE("cake_decode agrees with the oracle", "[oracle]") {
  check_random_problems(
      [](random_source& random) {
        policy::cake_decode policy;
        policy.recent = random_window(random);
        policy.budget = static_cast<count_t>(random.between(0, 60));
        policy.pool = random_pooling(random);
        return drawn<policy::cake_decode>{policy, 1, index_t{policy.budget} + policy.recent};
      },
      [](const policy::cake_decode& policy, index_t, const attention_rows& rows,
         const kept_heads& kept) {
        return disagreement(
            kept, reference::cake_decode(rows, static_cast<index_t>(kept.size()), policy.budget,
                                         policy.recent, kind_of(policy.pool), policy.pool.width));
      });
}

namespace {

/// Returns the attention of a row to tokens [token], scaled to sum 1.
scores normalised(scores row) {
  const double sum = std::accumulate(row.begin(), row.end(), 0.0);
  for (double& x : row) x /= sum;
  return row;
}

/// Returns the choice of each KV head: the union over its query heads, each with its last row.
template <class RowOf>
std::vector<choice> twilight(const policy::twilight& policy, index_t q_heads, index_t kv_heads,
                             const RowOf& row_of) {
  std::vector<scores> rows;
  for (index_t h = 0; h < q_heads; ++h) rows.push_back(normalised(row_of(h)));
  std::vector<choice> out;
  const index_t group = q_heads / kv_heads;
  for (index_t g = 0; g < kv_heads; ++g) {
    std::vector<choice> heads;
    for (index_t h = g * group; h < (g + 1) * group; ++h) {
      if (reference::any_nan({rows[size(h)]})) {
        heads.push_back(reference::keep_all(static_cast<index_t>(rows[size(h)].size())));
        continue;
      }
      heads.push_back(policy.sink_start ? reference::top_p_kernel(rows[size(h)], policy.mass)
                                        : reference::top_p(rows[size(h)], policy.mass));
    }
    out.push_back(reference::unite(heads));
  }
  return out;
}

policy::twilight random_twilight(random_source& random) {
  policy::twilight policy;
  policy.mass = random.one_of({0.0, 0.1, 0.5, 0.85, 0.95, 0.999, 1.0});
  policy.sink_start = random.chance(0.3);
  policy.full_layers = 2;
  return policy;
}

}  // namespace

TEST_CASE("twilight of exact attention agrees with the oracle", "[oracle]") {
  check_random_problems(
      [](random_source& random) {
        return drawn<policy::twilight>{random_twilight(random), 1, 0, random.between(1, 3)};
      },
      [](const policy::twilight& policy, index_t layer, const attention_rows& rows,
         const kept_heads& kept) {
        const auto kv_heads = static_cast<index_t>(kept.size());
        if (layer < policy.full_layers) {
          return disagreement(kept, reference::keep_all_heads(kv_heads, rows.tokens));
        }
        return disagreement(kept, twilight(policy, rows.q_heads, kv_heads, [&](index_t h) {
                              return reference::last_row(rows, h);
                            }));
      });
}

namespace {

/// A model's layers in CAKE's cascade: the state that the caller owns, and the oracle's results.
class cascade {
 public:
  cascade(const policy::cake& policy, const problem& shape)
      : policy_(policy),
        prompts_(shape.lengths),
        sequences_(shape.sequences()),
        kv_heads_(shape.keys.kv_heads),
        capacity_(shape.keys.longest() + 150),  // more than the largest cache has
        preferences_(size(sequences_ * (policy.layers + index_t{1})), -1.0) {
    for (count_t l = 0; l < policy.layers; ++l) layers_.push_back(unpruned());
  }

  /// Selects in a layer that has attention rows: it was just prefilled. Scores must not be equal,
  /// because variances are not exact.
  void prefill(problem& p, random_source& random, index_t l) {
    observe_somehow(
        p, random, l,
        [&](const auto& layer, const std::vector<attention_rows>& rows) {
          layer_state& now = layers_[size(l)];
          for (const attention_rows& of : rows) {
            now.oracle.push_back(reference::cake_statistics(of, kv_heads_, policy_.window,
                                                            policy_.gamma, kind_of(policy_.pool),
                                                            policy_.pool.width));
          }
          select(layer, l, l + 1);
          check_preferences(l, p.q_heads());
          drop(l, l + 1);
        },
        false);
  }
  /// Selects in a layer that was prefilled earlier: it has no attention rows.
  void shrink(index_t l, index_t finished) {
    const std::vector<position_t> lengths = lengths_of(l);
    const refreekv::layer_info<> info{.index = l};
    select(refreekv::observe(source(l, lengths), info), l, finished);
    drop(l, finished);
  }

 private:
  struct layer_state {
    std::vector<float> scores;
    std::vector<reference::cake_layer> oracle;  // [sequence]
    std::vector<std::vector<position_t>> held;  // [sequence, kv_head]
    ranked_selection selected;
  };

  layer_state unpruned() const {
    layer_state out{std::vector<float>(size(sequences_ * kv_heads_ * capacity_)), {}, {}, {}};
    for (const position_t n : prompts_) {
      std::vector<position_t> all(size(n));
      std::iota(all.begin(), all.end(), position_t{0});
      out.held.insert(out.held.end(), size(kv_heads_), all);
    }
    return out;
  }
  std::vector<position_t> lengths_of(index_t l) const {
    std::vector<position_t> out;
    for (index_t s = 0; s < sequences_; ++s) {
      out.push_back(static_cast<position_t>(layers_[size(l)].held[size(s * kv_heads_)].size()));
    }
    return out;
  }
  refreekv::dense<float> source(index_t l, const std::vector<position_t>& lengths) {
    return refreekv::dense<float>(refreekv::view<float, 4>(layers_[size(l)].scores.data(),
                                                           {sequences_, kv_heads_, capacity_, 1}),
                                  {lengths.data(), {sequences_}});
  }
  refreekv::cake_layers<> state(index_t l, index_t finished) {
    return {.scores = {layers_[size(l)].scores.data(), {sequences_, kv_heads_, capacity_}},
            .preferences = {preferences_.data(), {sequences_, policy_.layers + index_t{1}}},
            .finished = static_cast<count_t>(finished),
            .prompts = {prompts_.data(), {sequences_}}};
  }

  template <class Layer>
  void select(const Layer& observed, index_t l, index_t finished) {
    const auto layer = refreekv::with_layers(observed, state(l, finished));
    const layer_state before = layers_[size(l)];
    const std::vector<double> preferences_before = preferences_;
    const ranked_selection by_seven = run_ranked(policy_, divided<7>(), layer);
    const std::vector<float> scores_of_seven = layers_[size(l)].scores;
    const std::vector<double> preferences_of_seven = preferences_;
    std::copy(before.scores.begin(), before.scores.end(), layers_[size(l)].scores.begin());
    std::copy(preferences_before.begin(), preferences_before.end(), preferences_.begin());
    layers_[size(l)].selected = run_ranked(policy_, divided<1>(), layer);
    REQUIRE(layers_[size(l)].selected.status == refreekv::status::ok);
    CHECK(by_seven == layers_[size(l)].selected);
    CHECK(same_bits(scores_of_seven, layers_[size(l)].scores));
    CHECK(same_bits(preferences_of_seven, preferences_));
  }

  double& preference(index_t s, index_t l) {
    return preferences_[size(s * (policy_.layers + index_t{1}) + l)];
  }
  /// Checks preferences within bounds: in float, the entropy and the variance of each row have an
  /// error.
  void check_preferences(index_t l, index_t q_heads) {
    for (index_t s = 0; s < sequences_; ++s) {
      const reference::cake_layer& oracle = layers_[size(l)].oracle[size(s)];
      const double ours = preference(s, l);
      if (index_t{prompts_[size(s)]} <= policy_.window) continue;  // all tokens are in the window
      if (oracle.undecided && !(oracle.entropy > 0 && oracle.variance > 0)) {
        CHECK(!(ours > 0));  // NaN, or unchanged
        continue;
      }
      const double rows = static_cast<double>(q_heads * policy_.window);
      const auto bound = [&](double sign) {
        return (1 + sign * 1e-4) * reference::cake_preference(oracle.entropy + sign * 2e-7 * rows,
                                                              oracle.variance + sign * 2e-7 * rows,
                                                              policy_.tau1, policy_.tau2);
      };
      INFO("sequence " << s << " preference " << ours << ", oracle " << bound(0));
      CHECK(std::isnan(ours) == std::isnan(bound(0)));
      if (!std::isnan(ours)) CHECK((bound(-1) <= ours && ours <= bound(1)));
    }
  }

  /// Returns the oracle's choice among the tokens still in the layer. Its budgets follow from the
  /// preferences of the finished layers.
  std::vector<choice> expected(index_t s, index_t l, index_t finished) {
    const layer_state& now = layers_[size(l)];
    const index_t prompt = prompts_[size(s)], most = policy_.budget.of(prompt);
    const index_t left = static_cast<index_t>(now.held[size(s * kv_heads_)].size());
    const bool is_first = l == finished - 1;
    if (prompt <= most + policy_.window || (is_first && now.oracle[size(s)].undecided)) {
      return reference::keep_all_heads(kv_heads_, left);
    }
    std::vector<double> preferences;
    for (index_t m = 0; m < finished; ++m) preferences.push_back(preference(s, m));
    const index_t total = std::max<index_t>(0, most - policy_.window) * policy_.layers;
    const auto budgets = reference::cake_budgets(preferences, total, prompt - policy_.window);
    std::vector<scores> indicators;
    for (index_t h = 0; h < kv_heads_; ++h) {
      scores of_head;
      for (const position_t t : now.held[size(s * kv_heads_ + h)]) {
        if (t >= prompt - policy_.window) break;
        of_head.push_back(now.oracle[size(s)].indicators[size(h)][size(t)]);
      }
      indicators.push_back(of_head);
    }
    return reference::top_k(indicators, budgets[size(l)], left, 1e-5);
  }

  void drop(index_t l, index_t finished) {
    layer_state& now = layers_[size(l)];
    const std::vector<position_t> lengths = lengths_of(l);
    for (index_t s = 0; s < sequences_; ++s) {
      INFO("layer " << l << " of " << finished << ", sequence " << s << " of " << prompts_[size(s)]
                    << " tokens, " << lengths[size(s)] << " left");
      const auto kept = now.selected.kept.begin() + s * kv_heads_;
      CHECK(disagreement({kept, kept + kv_heads_}, expected(s, l, finished)) == "");
      for (index_t h = 0; h < kv_heads_; ++h) {
        const std::vector<position_t> slots = kept[h];
        std::vector<position_t>& held = now.held[size(s * kv_heads_ + h)];
        std::vector<position_t> left;
        float* const of_head = now.scores.data() + (s * kv_heads_ + h) * capacity_;
        for (std::size_t i = 0; i < slots.size(); ++i) {
          left.push_back(held[size(slots[i])]);
          of_head[i] = of_head[slots[i]];
        }
        held = left;
      }
    }
  }

  policy::cake policy_;
  std::vector<position_t> prompts_;
  index_t sequences_, kv_heads_, capacity_;
  std::vector<double> preferences_;  // [sequence, layers + 1]
  std::vector<layer_state> layers_;
};

policy::cake random_cake(random_source& random) {
  policy::cake policy;
  policy.window = random_window(random);
  policy.budget = random_budget(random, policy.window);
  policy.layers = static_cast<count_t>(random.between(1, 5));
  policy.gamma = random.one_of({0.0, 1.0, 200.0});
  policy.tau1 = random.one_of({0.4, 1.0, 1.6});
  policy.tau2 = random.one_of({0.4, 1.0, 2.3});
  policy.pool = random_pooling(random);
  return policy;
}

}  // namespace

TEST_CASE("budgets of layers are the oracle's", "[oracle]") {
  for (unsigned seed = base_seed(); seed < base_seed() + 10000; ++seed) {
    INFO("REFREEKV_SEED=" << seed);
    random_source random(seed);
    std::vector<double> preferences(size(random.between(1, 40)));
    const float spread = random.one_of({0.0f, 0.5f, 4.0f});
    for (double& x : preferences) x = std::exp(random.normal(spread));
    if (random.chance(0.02)) preferences[0] = random.one_of({0.0, HUGE_VAL, std::nan("")});
    const auto layers = static_cast<index_t>(preferences.size());
    const index_t total = random.between(0, 60) * layers + random.between(0, 1);
    const index_t available = random.between(0, 120);
    const auto oracle = reference::cake_budgets(preferences, total, available);
    std::vector<index_t> ours;
    for (index_t l = 0; l < layers; ++l) {
      ours.push_back(
          refreekv::detail::cake_budget(preferences.data(), 1, layers, l, total, available));
    }
    CHECK(ours == oracle);

    policy::pyramidkv policy;
    policy.budget = static_cast<count_t>(random.between(0, 300));
    policy.window = random_window(random);
    policy.beta = random.one_of<count_t>({1, 2, 5, 20});
    policy.layers = static_cast<count_t>(layers);
    const index_t tokens = random.between(0, 900), most = policy.budget.of(tokens);
    for (index_t l = 0; l < layers; ++l) {
      const auto budget =
          reference::pyramid_budget(tokens, l, layers, most, policy.window, policy.beta,
                                    reference::pyramid_divisor::layers_less_one);
      const refreekv::token_quota quota = policy.quota(l, tokens);
      if (tokens <= most) {
        CHECK(quota.ranked >= tokens);
      } else {
        CHECK(quota.ranked == budget.value());
        CHECK(quota.recent == policy.window);
      }
    }
  }
}

TEST_CASE("cake's cascade agrees with the oracle", "[oracle]") {
  const unsigned first = base_seed();
  for (unsigned seed = first; seed < first + problems / 2; ++seed) {  // 3 layers on average each
    random_source random(seed);
    const policy::cake policy = random_cake(random);
    problem p = random_problem(random, policy.window, policy.budget.of(60));
    INFO("REFREEKV_SEED=" << seed << " window " << index_t{policy.window} << " " << described(p));
    cascade model(policy, p);
    for (index_t l = 0; l < policy.layers; ++l) {
      problem of_layer = p;
      fill(of_layer, random);
      if (random.chance(0.05)) spoil(of_layer, random);
      model.prefill(of_layer, random, l);
      for (index_t m = 0; m < l; ++m) model.shrink(m, l + 1);
    }
  }
}

namespace {

scores query_of(const problem& p, index_t s, index_t head) {
  scores out;
  for (index_t d = 0; d < p.head_dim; ++d) out.push_back(p.query(s, p.window - 1, head, d));
  return out;
}

std::vector<scores> keys_of(const problem& p, index_t s, index_t kv_head) {
  std::vector<scores> out;
  for (index_t t = 0; t < p.lengths[size(s)]; ++t) {
    out.emplace_back();
    for (index_t d = 0; d < p.head_dim; ++d) out.back().push_back(p.key(s, kv_head, t, d));
  }
  return out;
}

/// Checks that codes equal the oracle's, unless a half may be rounded up or down.
void check_codes(estimates& ours, const problem& p) {
  for (index_t s = 0; s < p.sequences(); ++s) {
    for (index_t h = 0; h < p.keys.kv_heads; ++h) {
      const std::vector<scores> keys = keys_of(p, s, h);
      for (index_t t = 0; t < p.lengths[size(s)]; ++t) {
        const scores& key = keys[size(t)];
        const auto oracle = reference::quantise(key, 4);
        const auto [least, largest] = std::minmax_element(key.begin(), key.end());
        const double step = std::max(*largest - *least, 1e-9) / 15;
        const scores our_key = ours.key(s, h, t);
        for (index_t d = 0; d < p.head_dim; ++d) {
          const double exact = (key[size(d)] - *least) / step;
          const bool half = std::abs(std::abs(exact - std::floor(exact)) - 0.5) < 1e-5;
          const int code = ours.code(s, h, t, d);
          if (!half) REQUIRE(code == oracle.codes[size(d)]);
          REQUIRE(std::abs(code - exact) <= 0.5 + 1e-5);
          REQUIRE(std::abs(our_key[size(d)] - (*least + code * step)) <=
                  1e-6 * (1 + std::abs(*least) + std::abs(*largest)));
        }
      }
    }
  }
}

/// Returns the oracle's choice on the library's 4-bit keys. check_codes has compared the codes, so
/// a half rounded the other way is not counted twice.
std::vector<choice> estimated_choice(const policy::twilight& policy, const problem& p,
                                     estimates& ours, index_t s, index_t page_tokens,
                                     bool& near_tie) {
  const double scale = 1 / std::sqrt(static_cast<double>(p.head_dim));
  return twilight(policy, p.q_heads(), p.keys.kv_heads, [&](index_t h) {
    const index_t kv_head = h / p.group;
    std::vector<scores> estimated;
    for (index_t t = 0; t < p.lengths[size(s)]; ++t) estimated.push_back(ours.key(s, kv_head, t));
    const scores query = query_of(p, s, h);
    const scores logits = reference::logits(query, estimated, scale);
    if (page_tokens == 0) return reference::softmax(logits);
    const auto pages =
        reference::quest(query, keys_of(p, s, kv_head), page_tokens, policy.selector_budget);
    near_tie = near_tie || pages.margin < 1e-5;
    return reference::masked_softmax(logits, pages.tokens);
  });
}

/// Writes codes and page bounds of all tokens, then again of the second half of each sequence, as
/// decoding adds tokens.
template <class Keys>
void fill_estimates(estimates& to, const Keys& keys, const std::vector<position_t>& lengths) {
  std::vector<position_t> half;
  for (const position_t n : lengths) half.push_back(n / 2);
  const auto sequences = static_cast<index_t>(lengths.size());
  const refreekv::lengths_view<> from(half.data(), {sequences});
  const auto exec = divided<7>();
  REQUIRE(refreekv::quantise(exec, keys, to.keys()) == refreekv::status::ok);
  REQUIRE(refreekv::quantise(exec, keys, to.keys(), from) == refreekv::status::ok);
  REQUIRE(refreekv::bound_pages(exec, keys, to.page_bounds()) == refreekv::status::ok);
  REQUIRE(refreekv::bound_pages(exec, keys, to.page_bounds(), from) == refreekv::status::ok);
}

}  // namespace

TEST_CASE("twilight of 4-bit keys and selected pages agrees with the oracle", "[oracle]") {
  const unsigned first = base_seed();
  for (unsigned seed = first; seed < first + problems; ++seed) {
    random_source random(seed);
    policy::twilight policy = random_twilight(random);
    policy.full_layers = 0;
    policy.selector_budget = static_cast<count_t>(random.between(1, 60));
    const index_t page_tokens = random.one_of<index_t>({1, 4, 16, 20});
    problem p = random_problem(random, 1, policy.selector_budget);
    p = problem(p.keys.kv_heads, p.group, p.head_dim, 1, p.lengths);  // without other options
    fill(p, random);
    round_problem<Eigen::half>(p);
    INFO("REFREEKV_SEED=" << seed << " p " << policy.mass << " sink_start " << policy.sink_start
                          << " selected " << index_t{policy.selector_budget} << " pages of "
                          << page_tokens << " " << described(p));
    const dense_cache<float> keys(p.keys);
    const paged_cache<Eigen::half> pages_of_keys(p.keys, 16);
    estimates ours(pages_of_keys.source(), p.lengths, page_tokens);
    if (random.chance(0.5)) {
      fill_estimates(ours, keys.source(), p.lengths);
    } else {
      fill_estimates(ours, pages_of_keys.source(), p.lengths);
    }
    check_codes(ours, p);
    const auto in_4_bits = refreekv::observe(p.query_view(), ours.keys());
    const auto check = [&](const auto& layer, index_t pages) {
      const ranked_selection one = run_ranked(policy, divided<1>(), layer);
      REQUIRE(one.status == refreekv::status::ok);
      CHECK(run_ranked(policy, divided<7>(), layer) == one);
      for (index_t s = 0; s < p.sequences(); ++s) {
        INFO("sequence " << s << " of " << p.lengths[size(s)] << " tokens, paged " << pages);
        bool near_tie = false;
        const auto expected = estimated_choice(policy, p, ours, s, pages, near_tie);
        const auto kept = one.kept.begin() + s * p.keys.kv_heads;
        if (!near_tie) CHECK(disagreement({kept, kept + p.keys.kv_heads}, expected) == "");
      }
    };
    check(in_4_bits, 0);
    check(refreekv::with_pages(in_4_bits, ours.page_bounds()), page_tokens);
  }
}

TEST_CASE("a sink that has nearly all attention does not drown the others", "[oracle]") {
  problem p(1, 1, 1, 1, {600});
  p.scale = 1;
  p.query(0, 0, 0, 0) = 1;
  for (index_t t = 0; t < 600; ++t) {
    p.keys.at(0, 0, t, 0) = t == 0 ? 60.0f : t < 256 ? 0.0f : 5.0f;
  }
  const dense_cache<float> cache(p.keys);
  const policy::snapkv policy{.budget = 11, .window = 1, .pool = {.width = 1}};
  const ranked_selection s =
      run_ranked(policy, divided<1>(), refreekv::observe(p.query_view(), cache.source(), p.info()));
  CHECK(s.at(0) == std::vector<position_t>{0, 256, 257, 258, 259, 260, 261, 262, 263, 264, 599});
}
