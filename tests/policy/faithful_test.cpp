// SPDX-License-Identifier: Apache-2.0
// Checks the cache after a decision of faithful, and the errors of faithful.
#include "valued_selection.hpp"

using namespace refreekv;

namespace {

constexpr index_t kv_heads = 3, value_dim = 5;

struct valued_problem {
  problem p;
  plain_rows values;

  explicit valued_problem(std::vector<position_t> lengths, index_t heads = kv_heads,
                          index_t group = 2, unsigned seed = base_seed())
      : p(heads, group, 16, 8, lengths), values(heads, value_dim, lengths) {
    random_source random(seed);
    fill(p, random);
    for (auto& rows : values.values) {
      for (float& x : rows) x = random.normal();
    }
  }
};

/// Copies a layer to caches of T in the layout of this number, selects, and calls
/// check(keys, values, kept, backend).
template <class T, class Check>
void with_decision(valued_problem& l, const policy::faithful& policy, std::size_t layout,
                   const Check& check) {
  round_problem<T>(l.p);
  for (auto& rows : l.values.values) round_to<T>(rows);
  std::vector<T> queries;
  for (const float q : l.p.queries) queries.push_back(to_element<T>(q));
  const view q(queries.data(), {l.p.sequences(), l.p.window, l.p.q_heads(), l.p.head_dim});
  with_layout<T>(layout, l.p.keys, [&](const char* name, const auto& keys) {
    with_layout<T>(layout, l.values, [&](const char*, const auto& values) {
      INFO(name);
      const auto exec = divided<2>();
      const auto layer = with_values(observe(q, keys.source(), l.p.info()), values.source());
      guarded_bytes memory(workspace_size(policy, exec, layer));
      guarded_decision guarded(policy, layer);
      const kept_with_stand_ins<> kept = guarded.kept();
      REQUIRE(select(policy, exec, layer, kept, memory.middle()) == status::ok);
      check(keys, values, kept, exec);
      CHECK(memory.intact());
      CHECK(guarded.intact());
      CHECK(keys.untouched());
      CHECK(values.untouched());
    });
  });
}

/// Returns one row [dim] of a cache as floats.
template <class Source>
std::vector<float> row_of(const Source& source, index_t s, index_t h, index_t slot) {
  const auto run = source.run_at(s, h, slot);
  std::vector<float> row;
  for (index_t d = 0; d < source.shape().head_dim; ++d) {
    row.push_back(to_float(run.data[d * run.dim_stride]));
  }
  return row;
}

std::vector<float> row_of(const plain_rows& rows, index_t s, index_t h, index_t t) {
  std::vector<float> row;
  for (index_t d = 0; d < rows.head_dim; ++d) row.push_back(rows.at(s, h, t, d));
  return row;
}

template <class T>
std::vector<float> rounded(std::vector<float> row) {
  round_to<T>(row);
  return row;
}

template <class T>
void check_compaction(compaction mode, cut_scope scope) {
  for (std::size_t layout = 0; layout < layout_kinds; ++layout) {
    valued_problem l({300, 0, 40, 5, 129});
    const policy::faithful policy{.tolerance = 0.4, .block = 16, .scope = scope};
    with_decision<T>(
        l, policy, layout,
        [&](const auto& keys, const auto& values, const auto& kept, const auto& exec) {
          index_t stand_ins = 0;
          REQUIRE(why_invalid(kept, mode, keys.source(), values.source()) == nullptr);
          REQUIRE(compact(exec, kept, mode, keys.source(), values.source()) == status::ok);
          for (index_t s = 0; s < l.p.sequences(); ++s) {
            for (index_t h = 0; h < kv_heads; ++h) {
              const kept_tokens& k = kept.counts(s, h);
              const index_t rows = kept.length(s, h) - k.count;
              if (scope == cut_scope::layer) CHECK(kept.length(s, h) == kept.length(s, 0));
              CHECK(kept.length(s, h) <= k.tokens);
              CHECK(k.next_position() == l.p.lengths[size(s)]);
              const index_t first = first_slot(k, mode);
              for (index_t i = 0; i < k.count; ++i) {
                const index_t token = kept.positions(s, h, i);
                CHECK(row_of(keys.source(), s, h, first + i) == row_of(l.p.keys, s, h, token));
                CHECK(row_of(values.source(), s, h, first + i) == row_of(l.values, s, h, token));
              }
              const auto own_keys = rows_of(kept.stand_ins.keys, s, h, rows);
              const auto own_values = rows_of(kept.stand_ins.values, s, h, rows);
              const index_t at = first_stand_in(k, rows, mode);
              CHECK(at == (mode == compaction::suffix_down ? first + k.count : first - rows));
              for (index_t i = 0; i < rows; ++i) {
                CHECK(row_of(keys.source(), s, h, at + i) == rounded<T>(own_keys[size(i)]));
                CHECK(row_of(values.source(), s, h, at + i) == rounded<T>(own_values[size(i)]));
              }
              stand_ins += rows;
            }
          }
          CHECK(stand_ins > 0);
        });
  }
}

/// Returns the error of select, or "".
template <class Layer>
std::string refused(const policy::faithful& policy, const Layer& layer,
                    const kept_with_stand_ins<>& kept) {
  const char* why = why_invalid(policy, layer, kept);
  std::vector<std::byte> scratch(workspace_size(policy, divided<1>(), layer));
  const status s = select(policy, divided<1>(), layer, kept, scratch);
  CHECK(s == (why == nullptr ? status::ok : status::invalid_argument));
  return why == nullptr ? "" : why;
}

bool begins(const std::string& text, const std::string& start) { return text.starts_with(start); }

}  // namespace

TEST_CASE("what stays and its stand-ins lie together, in every layout and type", "[faithful]") {
  for (const compaction mode : {compaction::suffix_down, compaction::sinks_up}) {
    for (const cut_scope scope : {cut_scope::kv_head, cut_scope::layer}) {
      check_compaction<float>(mode, scope);
      check_compaction<Eigen::half>(mode, scope);
      check_compaction<bf16_bits>(mode, scope);
    }
  }
}

TEST_CASE("short prompts, one KV head, many query heads", "[faithful]") {
  for (const index_t group : {1, 128}) {
    for (const position_t n : {0, 1, 4, 5, 6, 33}) {
      INFO(n << " tokens, " << group << " query heads");
      valued_problem l({n}, 1, group);
      l.p.soft_cap = 20;
      with_decision<float>(
          l, {.tolerance = 1, .error_term = false}, 0,
          [&](const auto&, const auto&, const auto& kept, const auto&) {
            // At a tolerance of 1 only the tokens that always stay are kept: 4 sinks, and the last
            // 8 tokens, at most a quarter of the prompt, but at least one.
            const index_t last = std::max<index_t>(1, std::min<index_t>(8, n / 4));
            CHECK(kept.counts(0, 0).count == std::min<index_t>(n, 4 + last));
            const index_t dropped = n - kept.counts(0, 0).count;
            CHECK(kept.length(0, 0) - kept.counts(0, 0).count == (dropped < 2 ? 0 : 1));
          });
    }
  }
}

TEST_CASE("of equal tokens the lower head's stay, and of one head the lower ones", "[faithful]") {
  valued_problem l({200});
  for (index_t h = 0; h < kv_heads; ++h) {
    for (index_t t = 0; t < 200; ++t) {
      for (index_t d = 0; d < 16; ++d) l.p.keys.at(0, h, t, d) = l.p.keys.at(0, 0, 50, d);
      for (index_t d = 0; d < value_dim; ++d) l.values.at(0, h, t, d) = 1;
    }
    for (index_t r = 0; r < 8; ++r) {
      for (index_t g = 0; g < 2; ++g) {
        for (index_t d = 0; d < 16; ++d) l.p.query(0, r, 2 * h + g, d) = l.p.query(0, r, 0, d);
      }
    }
    // This key has another direction. Otherwise every distance would be 0.
    for (index_t d = 0; d < 16; ++d) l.p.keys.at(0, h, 1, d) = d % 2 == 0 ? 100.0f : -90.0f;
  }
  // All scores are equal, and half of all candidates stay: all of head 0 and half of head 1.
  const policy::faithful policy{.tolerance = 0.55, .sizes = 2, .error_term = false};
  with_decision<float>(l, policy, 0, [&](const auto&, const auto&, const auto& kept, const auto&) {
    CHECK(kept.counts(0, 0).count == 200);
    CHECK(kept.counts(0, 1).count == 4 + 94 + 8);
    for (index_t i = 0; i < 98; ++i) CHECK(kept.positions(0, 1, i) == i);
    CHECK(kept.counts(0, 2).count == 12);
  });
}

TEST_CASE("values that are 0 say nothing: all stay", "[faithful]") {
  valued_problem l({90});
  for (auto& rows : l.values.values) std::fill(rows.begin(), rows.end(), 0.0f);
  with_decision<float>(l, {}, 0, [&](const auto&, const auto&, const auto& kept, const auto&) {
    for (index_t h = 0; h < kv_heads; ++h) CHECK(kept.counts(0, h).count == 90);
  });
}

TEST_CASE("options of faithful outside their range are named", "[faithful]") {
  const auto names = [](const policy::faithful& policy, const std::string& option) {
    const char* why = why_invalid(policy);
    return why != nullptr && begins(why, option);
  };
  CHECK(why_invalid(policy::faithful{}) == nullptr);
  for (const double bad : {-0.1, 1.1, std::nan("")}) {
    CHECK(names({.tolerance = bad}, "tolerance"));
    CHECK(names({.last_row = bad == 1.1 ? 101 : bad}, "last_row"));
    CHECK(names({.prior = bad}, "prior"));
    CHECK(names({.ridge = bad}, "ridge"));
  }
  CHECK(names({.prior = 0}, "prior"));
  CHECK(names({.ridge = 0}, "ridge"));
  const auto wrapped = static_cast<count_t>(-1);
  CHECK(names({.sinks = wrapped}, "sinks"));
  CHECK(names({.recent = wrapped}, "recent"));
  for (const count_t bad : {count_t{0}, wrapped}) {
    CHECK(names({.window = bad}, "window"));
    CHECK(names({.block = bad}, "block"));
    CHECK(names({.sizes = bad}, "sizes"));
    CHECK(names({.error_rows = bad}, "error_rows"));
  }
  CHECK(names({.block = 257}, "block"));
  CHECK(names({.sizes = 65}, "sizes"));
}

TEST_CASE("an engine hears why faithful does not decide", "[faithful]") {
  valued_problem l({90});
  const dense_cache<float> keys(l.p.keys), values(l.values);
  const auto observed = observe(l.p.query_view(), keys.source(), l.p.info());
  const auto layer = with_values(observed, values.source());
  const policy::faithful policy, positions{.stand_ins = false};
  guarded_decision guarded(policy, layer);
  const kept_with_stand_ins<> kept = guarded.kept();
  CHECK(refused(policy, layer, kept) == "");

  const kept_positions<>& only = kept;
  CHECK(begins(refused(policy, layer, only), "no memory for stand-ins"));
  CHECK(refused(positions, layer, only) == "");

  kept_with_stand_ins<> small = kept;
  small.stand_ins.keys = {kept.stand_ins.keys.data(), {1, kv_heads, 1, 16}};
  CHECK(begins(refused(policy, layer, small), "stand-ins must be"));
  small = kept;
  small.stand_ins.values = {kept.stand_ins.values.data(), {1, kv_heads, 2, value_dim - 1}};
  CHECK(begins(refused(policy, layer, small), "stand-ins must be"));
  small = kept;
  small.stand_ins.counts = {kept.stand_ins.counts.data(), {1, kv_heads - 1}};
  CHECK(begins(refused(policy, layer, small), "stand-in counts"));

  const std::vector<float> slopes(size(l.p.q_heads()), 0.1f);
  auto alibi = layer;
  alibi.info.attention.alibi_slopes = {slopes.data(), {l.p.q_heads()}};
  CHECK(begins(refused(policy, alibi, kept), "stand-ins have no position"));
  CHECK(refused(positions, alibi, only) == "");

  // In multi-head latent attention, values are the first dimensions of the keys.
  const auto rows = keys.source().run_at(0, 0, 0);
  const dense latent(
      view<float, 4>(rows.data, {1, kv_heads, 90, 8},
                     {0, keys.source().run_at(0, 1, 0).data - rows.data, rows.token_stride, 1}));
  const auto mla = with_values(observed, latent);
  CHECK(begins(refused(policy, mla, kept), "values are a part of the keys"));
  CHECK(refused(positions, mla, only) == "");

  valued_problem shorter({80});
  const dense_cache<float> others(shorter.values);
  CHECK(begins(refused(policy, with_values(observed, others.source()), kept), "values and keys"));
}

TEST_CASE("stand-ins go into keys and values, and into what dropped tokens leave", "[faithful]") {
  valued_problem l({90});
  const policy::faithful policy{.tolerance = 0.4};
  with_decision<float>(l, policy, 0,
                       [&](const auto& keys, const auto& values, auto kept, const auto& exec) {
                         constexpr auto mode = compaction::suffix_down;
                         const auto why = [&](const auto&... sources) {
                           const char* text = why_invalid(kept, mode, sources...);
                           CHECK(compact(exec, kept, mode, sources...) ==
                                 (text == nullptr ? status::ok : status::invalid_argument));
                           return std::string(text == nullptr ? "" : text);
                         };
                         CHECK(begins(why(keys.source()), "stand-ins are keys and values"));
                         CHECK(begins(why(keys.source(), keys.source()), "stand-ins must be"));
                         position_t& count = kept.stand_ins.counts(0, 1);
                         const position_t before = count;
                         REQUIRE(before > 0);
                         count = static_cast<position_t>(kept.counts(0, 1).dropped() + 1);
                         CHECK(begins(why(keys.source(), values.source()), "more stand-ins"));
                         count = -1;
                         CHECK(begins(why(keys.source(), values.source()), "more stand-ins"));
                         count = before;
                         CHECK(why(keys.source(), values.source()) == "");
                       });
}

TEST_CASE("prune selects, gathers and fills in", "[faithful]") {
  valued_problem l({150});
  const dense_cache<float> keys(l.p.keys), values(l.values);
  const policy::faithful policy{.tolerance = 0.3};
  const auto layer =
      with_values(observe(l.p.query_view(), keys.source(), l.p.info()), values.source());
  const valued_selection expected = run_valued(policy, divided<1>(), layer);
  guarded_decision guarded(policy, layer);
  const kept_with_stand_ins<> kept = guarded.kept();
  std::vector<std::byte> scratch(workspace_size(policy, divided<1>(), layer));
  REQUIRE(prune(policy, divided<1>(), layer, kept, scratch, compaction::suffix_down) == status::ok);
  for (index_t h = 0; h < kv_heads; ++h) {
    CHECK(positions_of(kept, 0, h) == expected.at(0, h));
    const auto& own = expected.keys[size(h)];
    for (std::size_t i = 0; i < own.size(); ++i) {
      CHECK(row_of(keys.source(), 0, h, kept.counts(0, h).count + static_cast<index_t>(i)) ==
            own[i]);
    }
  }
}

TEST_CASE("a decision without stand-ins leaves none of an earlier one", "[faithful]") {
  valued_problem l({150});
  const dense_cache<float> keys(l.p.keys), values(l.values);
  const auto layer =
      with_values(observe(l.p.query_view(), keys.source(), l.p.info()), values.source());
  const policy::faithful with{.tolerance = 0.3};
  guarded_decision guarded(with, layer);
  const kept_with_stand_ins<> kept = guarded.kept();
  for (const bool stand_ins : {true, false}) {
    const policy::faithful policy{.tolerance = 0.3, .stand_ins = stand_ins};
    std::vector<std::byte> scratch(workspace_size(policy, divided<1>(), layer));
    REQUIRE(select(policy, divided<1>(), layer, kept, scratch) == status::ok);
    for (index_t h = 0; h < kv_heads; ++h) {
      CHECK((kept.length(0, h) > kept.counts(0, h).count) == stand_ins);
    }
  }
}

TEST_CASE("prune writes stand-ins into values that are passed by name, too", "[faithful]") {
  valued_problem l({150});
  const dense_cache<float> keys(l.p.keys), values(l.values);
  const policy::faithful policy{.tolerance = 0.3};
  const auto layer =
      with_values(observe(l.p.query_view(), keys.source(), l.p.info()), values.source());
  guarded_decision guarded(policy, layer);
  const kept_with_stand_ins<> kept = guarded.kept();
  std::vector<std::byte> scratch(workspace_size(policy, divided<1>(), layer));
  REQUIRE(prune(policy, divided<1>(), layer, kept, scratch, compaction::suffix_down,
                values.source()) == status::ok);
  for (index_t h = 0; h < kv_heads; ++h) {
    const float* row = kept.stand_ins.values.at(0, h, 0);
    CHECK(row_of(values.source(), 0, h, kept.counts(0, h).count) ==
          std::vector<float>(row, row + value_dim));
  }
}

TEST_CASE("workers beyond the KV heads need a tile at most", "[faithful][workspace]") {
  valued_problem l({1000});
  const dense_cache<float> keys(l.p.keys), values(l.values);
  const auto layer = observe(l.p.query_view(), keys.source(), l.p.info());
  const auto check = [&](const auto& policy, const auto& what, std::size_t tile, const auto& run) {
    const std::size_t few = workspace_size(policy, divided<kv_heads>(), what);
    CHECK(workspace_size(policy, divided<64>(), what) <= few + (64 - kv_heads) * tile);
    CHECK(run(policy, divided<64>(), what) == run(policy, divided<1>(), what));
  };
  check(policy::faithful{}, with_values(layer, values.source()), 0,
        [](const auto&... a) { return run_valued(a...); });
  // Here they share the chunks of a KV head.
  check(policy::snapkv{.budget = 300}, layer, 10'000,
        [](const auto&... a) { return run_ranked(a...); });
}
