// SPDX-License-Identifier: Apache-2.0
// Compares faithful with the double-precision oracle on random problems.
#include "faithful_reference.hpp"
#include "valued_selection.hpp"

namespace {

constexpr unsigned problems = exhaustive ? affordable(1000) : 250;

namespace policy = refreekv::policy;
using reference::faithful_layer;

policy::faithful random_rule(random_source& random, bool alibi) {
  policy::faithful policy;
  policy.tolerance = random.one_of({1e-4, 0.01, 0.05, 0.1, 0.2, 0.4, 0.97});
  policy.sinks = random.one_of<count_t>({0, 1, 4, 4, 7});
  policy.recent = random.one_of<count_t>({0, 1, 8, 8, 30});
  policy.window = random.one_of<count_t>({1, 2, 5, 8, 32});
  policy.last_row = random.one_of({2.0, 2.0, 0.0, 0.5});
  policy.prior = random.one_of({0.02, 0.02, 1e-4, 0.5});
  policy.block = random.one_of<count_t>({64, 16, 7, 1, 256});
  policy.sizes = random.one_of<count_t>({16, 16, 1, 5, 33, 64});
  policy.error_rows = random.one_of<count_t>({4, 1, 3, 100});
  policy.ridge = random.one_of({0.05, 0.05, 0.3});
  policy.stand_ins = !alibi && random.chance(0.75);
  policy.error_term = random.chance(0.75);
  policy.scope = random.one_of({refreekv::cut_scope::kv_head, refreekv::cut_scope::layer});
  return policy;
}

position_t random_length(random_source& random) {
  return static_cast<position_t>(random.chance(0.3) ? random.one_of<index_t>({0, 1, 2, 4, 5, 6, 9})
                                 : random.chance(0.1) ? random.between(250, 300)
                                                      : random.between(7, 150));
}

problem random_problem(random_source& random) {
  std::vector<position_t> lengths(size(random.between(0, 3)));
  for (position_t& n : lengths) n = random_length(random);
  const index_t window = random.one_of<index_t>({1, 3, 8, 20});
  problem p(random.one_of<index_t>({1, 2, 3}), random.one_of<index_t>({1, 2, 3, 4, 8}),
            random.chance(0.03) ? 1 : random.one_of<index_t>({4, 8, 16, 20}), window, lengths);
  fill(p, random);
  const auto some = [&](std::vector<float>& per_head, float low, float high) {
    for (index_t h = 0; h < p.q_heads(); ++h) {
      per_head.push_back(low + (high - low) * static_cast<float>(random.between(0, 100)) / 100);
    }
  };
  if (random.chance(0.2)) p.scale = random.one_of({0.05f, 0.25f});
  if (random.chance(0.15)) p.soft_cap = random.one_of({5.0f, 30.0f});
  if (random.chance(0.15)) p.sliding_window = random.one_of<count_t>({5, 30, 5000});
  if (random.chance(0.1)) some(p.alibi_slopes, 0, 0.5f);
  if (random.chance(0.15)) some(p.sink_logits, -5, 5);
  add_rows(p, random);
  return p;
}

/// Random values with a head_dim of their own. Their norm differs from token to token.
plain_rows random_values(const problem& p, random_source& random) {
  plain_rows values(p.keys.kv_heads, random.one_of<index_t>({1, 8, 20}), p.lengths);
  for (auto& rows : values.values) {
    for (float& x : rows) x = random.normal();
  }
  return values;
}

/// Spoils about half of the sequences, each with one of: an infinite value, a NaN in a key, an
/// infinite query, or a key of zeros. A key of zeros has no direction; the others allow no
/// decision.
void spoil(problem& p, plain_rows& values, random_source& random) {
  for (index_t s = 0; s < p.sequences(); ++s) {
    const index_t n = p.lengths[size(s)];
    if (n == 0 || random.chance(0.5)) continue;
    const index_t h = random.between(0, p.keys.kv_heads - 1), t = random.between(0, n - 1);
    switch (random.between(0, 4)) {
      case 0: values.at(s, h, t, 0) = std::numeric_limits<float>::infinity(); break;
      case 1: p.keys.at(s, h, t, 0) = std::numeric_limits<float>::quiet_NaN(); break;
      case 2: p.query(s, p.window - 1, 0, 0) = std::numeric_limits<float>::infinity(); break;
      default:
        for (index_t d = 0; d < p.head_dim; ++d) p.keys.at(s, h, t, d) = 0;
        break;
    }
  }
}

/// Counts the sizes that were compared, and those too near to the limit to be compared.
struct doubts {
  unsigned sizes = 0, near = 0;
};

double distance(const std::vector<float>& ours, const reference::scores& theirs) {
  double sum = 0, norm = 0;
  for (std::size_t d = 0; d < theirs.size(); ++d) {
    sum += std::pow(double{ours[d]} - theirs[d], 2);
    norm += theirs[d] * theirs[d];
  }
  return std::sqrt(sum) / (std::sqrt(norm) + 0.05);  // a sum that nearly cancels has fewer digits
}

/// Returns how a sequence's decision differs from the oracle's, or "" if it does not, or if
/// rounding explains the difference.
std::string disagreement(const policy::faithful& policy, const faithful_layer& oracle,
                         const valued_selection& ours, index_t s, index_t tokens, doubts& layer) {
  const index_t kv_heads = oracle.kv_heads();
  std::vector<std::vector<bool>> stays;
  index_t total = 0;
  for (index_t h = 0; h < kv_heads; ++h) {
    stays.emplace_back(size(tokens), false);
    for (const position_t t : ours.at(s, h)) stays.back()[size(t)] = true;
    total += static_cast<index_t>(ours.at(s, h).size());
    if (ours.counts[size(s * kv_heads + h)].undecided != oracle.undecided()) return "undecided";
    if (policy.scope == refreekv::cut_scope::layer &&
        ours.at(s, h).size() != ours.at(s, 0).size()) {
      return "KV heads keep different numbers";
    }
  }
  if (oracle.all_stay()) return total == tokens * kv_heads ? "" : "not all stay";

  // Finds the chosen size and checks that bisection leads to it.
  index_t chosen = -1;
  for (index_t i = policy.sizes; i >= 0; --i) {
    index_t kept = 0;
    for (const auto& head : oracle.kept(i)) kept += std::count(head.begin(), head.end(), true);
    if (kept == total) chosen = i;
  }
  if (chosen < 0) return "no size keeps " + std::to_string(total);
  const auto same_size = [&](index_t i) { return oracle.kept_by(i) == oracle.kept_by(chosen); };
  index_t low = -1, high = policy.sizes;
  bool certain = true;
  while (high - low > 1) {
    const index_t middle = low + (high - low) / 2;
    const auto [lost, error] = oracle.cost_of(middle);
    const double criterion = policy.error_term ? std::sqrt(error * lost) : lost;
    // Outputs are in float, so an error is known only to 2e-7.
    const double enough = policy.tolerance * policy.tolerance / lost;
    const bool near = std::abs(criterion - policy.tolerance) <= 1e-6 ||
                      (policy.error_term && std::abs(error - enough) <= 2e-7) ||
                      oracle.is_near_tie(middle);
    ++layer.sizes;
    layer.near += near ? 1 : 0;
    certain = certain && !near;
    if (!certain) break;
    (criterion <= policy.tolerance ? high : low) = middle;
  }
  if (certain && !same_size(high)) {
    return "size " + std::to_string(chosen) + " of " + std::to_string(index_t{policy.sizes}) +
           ", oracle " + std::to_string(high);
  }

  // Compares the tokens that this size keeps.
  const auto expected = oracle.kept(chosen);
  if (stays != expected && !oracle.is_near_tie(chosen)) return "other tokens";

  std::size_t most = 0;  // blocks of a KV head; if heads share one length, all have as many
  for (index_t h = 0; policy.scope == refreekv::cut_scope::layer && h < kv_heads; ++h) {
    most = std::max(most, oracle.blocks(stays[size(h)]).size());
  }
  for (index_t h = 0; h < kv_heads; ++h) {
    const auto [keys, values] = oracle.stand_ins(h, stays[size(h)], most);
    const auto& our_keys = ours.keys[size(s * kv_heads + h)];
    const auto& our_values = ours.values[size(s * kv_heads + h)];
    if (our_keys.size() != keys.size()) {
      return std::to_string(our_keys.size()) + " stand-ins for " + std::to_string(keys.size());
    }
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (!(distance(our_keys[i], keys[i]) <= 1e-4)) return "key of a stand-in";
      if (!(distance(our_values[i], values[i]) <= 1e-4)) return "value of a stand-in";
    }
  }
  return "";
}

template <class T, class Keys, class Values>
void check(const policy::faithful& policy, problem& p, plain_rows& values, const Keys& keys,
           const Values& value_cache, doubts& layer) {
  std::vector<T> queries;
  for (const float q : p.queries) queries.push_back(to_element<T>(q));
  const refreekv::view q(queries.data(), {p.sequences(), p.window, p.q_heads(), p.head_dim});
  const auto observed =
      refreekv::with_values(refreekv::observe(q, keys.source(), p.info()), value_cache.source());
  const valued_selection ours = run_valued(policy, divided<1>(), observed);
  REQUIRE(ours.status == refreekv::status::ok);
  CHECK(run_valued(policy, divided<7>(), observed) == ours);
  if (refreekv::workspace_size(policy, divided<1>(), observed) > 0) {
    CHECK(run_valued(policy, divided<1>(), observed, 1).status ==
          refreekv::status::small_workspace);
  }
  CHECK(keys.untouched());
  CHECK(value_cache.untouched());
  for (index_t s = 0; s < p.sequences(); ++s) {
    INFO("sequence " << s << " of " << p.lengths[size(s)] << " tokens");
    const faithful_layer oracle(policy, p, values, s);
    CHECK(disagreement(policy, oracle, ours, s, p.lengths[size(s)], layer) == "");
  }
}

}  // namespace

TEST_CASE("faithful agrees with the oracle", "[oracle]") {
  using half = Eigen::half;
  using bf16 = refreekv::bf16_bits;
  const unsigned first = base_seed();
  doubts layer;
  for (unsigned seed = first; seed < first + problems; ++seed) {
    random_source random(seed);
    problem p = random_problem(random);
    plain_rows values = random_values(p, random);
    const policy::faithful policy = random_rule(random, !p.alibi_slopes.empty());
    if (random.chance(0.15)) spoil(p, values, random);
    INFO("REFREEKV_SEED=" << seed);
    const auto keys_as = random.between(0, layout_kinds - 1);
    const auto values_as = random.between(0, layout_kinds - 1);
    const auto with_type = [&]<class T>(T) {
      round_problem<T>(p);
      for (auto& rows : values.values) round_to<T>(rows);
      with_layout<T>(size(keys_as), p.keys, [&](const char*, const auto& keys) {
        with_layout<T>(size(values_as), values, [&](const char*, const auto& value_cache) {
          check<T>(policy, p, values, keys, value_cache, layer);
        });
      });
    };
    switch (random.between(0, 2)) {
      case 0: with_type(float{}); break;
      case 1: with_type(half{}); break;
      default: with_type(bf16{}); break;
    }
  }
  INFO(layer.near << " of " << layer.sizes << " sizes were too near to call");
  CHECK(layer.near * 50 < layer.sizes);
}
