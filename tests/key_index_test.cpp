// SPDX-License-Identifier: Apache-2.0
#include "refreekv/key_index.hpp"

#include "estimates.hpp"
#include "ranked_selection.hpp"

using namespace refreekv;

namespace {

plain_rows random_rows(unsigned seed, index_t dims = 7) {
  random_source random(seed);
  plain_rows rows(2, dims, {30, 0, 5, 1});
  for (auto& sequence : rows.values) {
    for (float& x : sequence) x = random.normal();
  }
  return rows;
}

/// At most `length` tokens of each sequence.
plain_rows first_tokens(const plain_rows& rows, position_t length) {
  std::vector<position_t> lengths;
  for (const position_t n : rows.lengths) lengths.push_back(std::min(n, length));
  plain_rows out(rows.kv_heads, rows.head_dim, lengths);
  for (index_t s = 0; s < out.sequences(); ++s) {
    for (index_t h = 0; h < out.kv_heads; ++h) {
      for (index_t t = 0; t < lengths[size(s)]; ++t) {
        for (index_t d = 0; d < out.head_dim; ++d) out.at(s, h, t, d) = rows.at(s, h, t, d);
      }
    }
  }
  return out;
}

}  // namespace

TEST_CASE("codes are within half a step of the keys, in every layout", "[key_index]") {
  const plain_rows rows = random_rows(base_seed());
  for_each_layout<float>(rows, [&](const char* layout, const auto& cache) {
    INFO(layout);
    estimates memory(cache.source(), rows.lengths, 4);
    const int4_keys<> to = memory.keys();
    REQUIRE(quantise(divided<2>(), cache.source(), to) == status::ok);
    for (index_t s = 0; s < rows.sequences(); ++s) {
      for (index_t h = 0; h < rows.kv_heads; ++h) {
        for (index_t t = 0; t < rows.lengths[size(s)]; ++t) {
          const float step = to.ranges(s, h, t, 1);
          const std::vector<double> estimate = memory.key(s, h, t);
          int smallest = 15, largest = 0;
          for (index_t d = 0; d < rows.head_dim; ++d) {
            const int code = memory.code(s, h, t, d);
            smallest = std::min(smallest, code);
            largest = std::max(largest, code);
            const double error = double{rows.at(s, h, t, d)} - estimate[size(d)];
            CHECK(std::abs(error) <= 0.5001 * double{step});
          }
          CHECK(smallest == 0);
          CHECK(largest == 15);
        }
      }
    }
  });
}

TEST_CASE("bounds are those of each page's keys", "[key_index]") {
  const plain_rows rows = random_rows(base_seed() + 1);
  const dense_cache<float> cache(rows);
  estimates memory(cache.source(), rows.lengths, 4);
  const page_bounds<> to = memory.page_bounds();
  REQUIRE(bound_pages(divided<1>(), cache.source(), to) == status::ok);
  for (index_t s = 0; s < rows.sequences(); ++s) {
    for (index_t h = 0; h < rows.kv_heads; ++h) {
      for (index_t page = 0; page * 4 < rows.lengths[size(s)]; ++page) {
        for (index_t d = 0; d < rows.head_dim; ++d) {
          float low = rows.at(s, h, page * 4, d), high = low;
          for (index_t t = page * 4; t < std::min<index_t>(page * 4 + 4, rows.lengths[size(s)]);
               ++t) {
            low = std::min(low, rows.at(s, h, t, d));
            high = std::max(high, rows.at(s, h, t, d));
          }
          CHECK(to.bounds(s, h, page, 0, d) == low);
          CHECK(to.bounds(s, h, page, 1, d) == high);
        }
      }
    }
  }
}

TEST_CASE("tokens that come later leave the same index as all at once", "[key_index]") {
  const plain_rows rows = random_rows(base_seed() + 2, 8);
  const dense_cache<float> cache(rows);
  estimates whole(cache.source(), rows.lengths, 4), grown(cache.source(), rows.lengths, 4);
  REQUIRE(quantise(divided<1>(), cache.source(), whole.keys()) == status::ok);
  REQUIRE(bound_pages(divided<1>(), cache.source(), whole.page_bounds()) == status::ok);
  std::vector<position_t> from(4, 0);
  for (position_t length = 1; length <= 30; length += 3) {
    const plain_rows shorter = first_tokens(rows, length);
    const dense_cache<float> so_far(shorter);
    const lengths_view<> first(from.data(), {4});
    REQUIRE(quantise(divided<1>(), so_far.source(), grown.keys(), first) == status::ok);
    REQUIRE(bound_pages(divided<1>(), so_far.source(), grown.page_bounds(), first) == status::ok);
    from = shorter.lengths;
  }
  // The last step went to 28 of 30 tokens.
  REQUIRE(quantise(divided<1>(), cache.source(), grown.keys(), {from.data(), {4}}) == status::ok);
  REQUIRE(bound_pages(divided<1>(), cache.source(), grown.page_bounds(), {from.data(), {4}}) ==
          status::ok);
  CHECK(grown.same_as(whole));
}

TEST_CASE("NaN in a key stays in its codes and bounds", "[key_index]") {
  for (index_t d = 0; d < 4; ++d) {
    plain_rows rows(1, 4, {8});
    for (index_t t = 0; t < 8; ++t) {
      for (index_t i = 0; i < 4; ++i) rows.at(0, 0, t, i) = static_cast<float>(i + t);
    }
    rows.at(0, 0, 1, d) = std::nanf("");
    const dense_cache<float> cache(rows);
    estimates memory(cache.source(), rows.lengths, 4);
    REQUIRE(quantise(divided<1>(), cache.source(), memory.keys()) == status::ok);
    REQUIRE(bound_pages(divided<1>(), cache.source(), memory.page_bounds()) == status::ok);
    CHECK(std::isnan(memory.key(0, 0, 1)[size(d)]));
    CHECK_FALSE(std::isnan(memory.key(0, 0, 2)[size(d)]));
    CHECK(std::isnan(memory.page_bounds().bounds(0, 0, 0, 0, d)));
    CHECK(std::isnan(memory.page_bounds().bounds(0, 0, 0, 1, d)));
    CHECK_FALSE(std::isnan(memory.page_bounds().bounds(0, 0, 1, 0, d)));
  }
}

namespace {

/// twilight keeps of the estimates what it keeps of the keys, and not everything.
void check_same_choice(const problem& p, const dense_cache<float>& cache, estimates& memory) {
  const policy::twilight policy{.mass = 0.9};
  const auto exact = observe(p.query_view(), cache.source(), p.info());
  const auto estimate = observe(p.query_view(), memory.keys(), p.info());
  const ranked_selection expected = run_ranked(policy, divided<1>(), exact);
  REQUIRE(expected.status == status::ok);
  CHECK(expected.counts[0].dropped() > 0);
  CHECK(run_ranked(policy, divided<1>(), estimate) == expected);
}

}  // namespace

TEST_CASE("twilight keeps the same tokens of keys that 4 bits can hold", "[key_index]") {
  random_source random(base_seed() + 3);
  problem p(2, 3, 16, 1, {200, 40});
  for (float& q : p.queries) q = random.normal();
  for (auto& sequence : p.keys.values) {
    for (std::size_t i = 0; i < sequence.size(); ++i) {
      // Every key has a -7.5 and a 7.5, so steps are 1.
      sequence[i] = i % 16 < 2 ? (i % 2 == 0 ? -7.5f : 7.5f)
                               : static_cast<float>(random.between(0, 15)) - 7.5f;
    }
  }
  const dense_cache<float> cache(p.keys);
  estimates memory(cache.source(), p.lengths, 4);
  REQUIRE(quantise(divided<1>(), cache.source(), memory.keys()) == status::ok);
  check_same_choice(p, cache, memory);
}

namespace {

/// A large component that all keys share, as with Qwen2.
void share_component(plain_rows& rows, float component) {
  for (index_t s = 0; s < rows.sequences(); ++s) {
    for (index_t h = 0; h < rows.kv_heads; ++h) {
      for (index_t t = 0; t < rows.lengths[size(s)]; ++t) rows.at(s, h, t, 3) += component;
    }
  }
}

/// The largest component of the difference, in steps of the token.
double steps_off(estimates& memory, const plain_rows& rows, index_t s, index_t h, index_t t) {
  const std::vector<double> estimate = memory.key(s, h, t);
  double most = 0;
  for (index_t d = 0; d < rows.head_dim; ++d) {
    most = std::max(most, std::abs(double{rows.at(s, h, t, d)} - estimate[size(d)]));
  }
  return most / double{memory.keys().ranges(s, h, t, 1)};
}

}  // namespace

TEST_CASE("centres are the means of the keys, and codes are relative to them", "[key_index]") {
  plain_rows rows = random_rows(base_seed() + 5, 70);
  share_component(rows, 100);
  const dense_cache<float> cache(rows);
  estimates memory(cache.source(), rows.lengths, 4, true);
  REQUIRE(quantise(divided<2>(), cache.source(), memory.keys()) == status::ok);
  for (index_t s = 0; s < rows.sequences(); ++s) {
    const index_t tokens = rows.lengths[size(s)];
    for (index_t h = 0; h < rows.kv_heads; ++h) {
      for (index_t d = 0; d < rows.head_dim; ++d) {
        double sum = 0;
        for (index_t t = 0; t < tokens; ++t) sum += double{rows.at(s, h, t, d)};
        const double mean = sum / static_cast<double>(std::max<index_t>(tokens, 1));
        CHECK(std::abs(double{memory.centres()(s, h, d)} - mean) <= 1e-5);
      }
      for (index_t t = 0; t < tokens; ++t) {
        CHECK(memory.keys().ranges(s, h, t, 1) < 1);  // 6.7 without
        // Beside half a step, what is left of a component of 100 in a float.
        const double rounding = 2e-5 / double{memory.keys().ranges(s, h, t, 1)};
        CHECK(steps_off(memory, rows, s, h, t) <= 0.5001 + rounding);
      }
    }
  }
}

TEST_CASE("tokens that come later leave the centres", "[key_index]") {
  plain_rows rows = random_rows(base_seed() + 6, 8);
  share_component(rows, 100);
  const dense_cache<float> cache(rows);
  estimates whole(cache.source(), rows.lengths, 4, true);
  estimates grown(cache.source(), rows.lengths, 4, true);
  plain_rows so_far = first_tokens(rows, 10);
  for (estimates* each : {&whole, &grown}) {
    const dense_cache<float> first(so_far);
    REQUIRE(quantise(divided<1>(), first.source(), each->keys()) == status::ok);
  }
  CHECK(whole.same_as(grown));
  const float centre = whole.centres()(0, 1, 3);
  std::vector<position_t> from = so_far.lengths;
  REQUIRE(quantise(divided<1>(), cache.source(), whole.keys(), {from.data(), {4}}) == status::ok);
  for (position_t length = 13; length <= 31; length += 3) {
    so_far = first_tokens(rows, length);
    const dense_cache<float> longer(so_far);
    REQUIRE(quantise(divided<1>(), longer.source(), grown.keys(), {from.data(), {4}}) ==
            status::ok);
    from = so_far.lengths;
  }
  CHECK(grown.same_as(whole));
  CHECK(whole.centres()(0, 1, 3) == centre);
  CHECK(steps_off(whole, rows, 0, 1, 29) <= 0.501);
}

TEST_CASE("what is not finite spoils its own token, and no centre", "[key_index]") {
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    plain_rows rows = random_rows(base_seed() + 7);
    rows.at(0, 0, 4, 2) = bad;
    const dense_cache<float> cache(rows);
    estimates memory(cache.source(), rows.lengths, 4, true);
    REQUIRE(quantise(divided<1>(), cache.source(), memory.keys()) == status::ok);
    CHECK_FALSE(std::isfinite(memory.key(0, 0, 4)[2]));
    double sum = 0;
    for (index_t t = 0; t < 30; ++t) {
      if (t == 4) continue;
      sum += double{rows.at(0, 0, t, 2)};
      CHECK(steps_off(memory, rows, 0, 0, t) <= 0.501);
    }
    CHECK(double{memory.centres()(0, 0, 2)} == Approx(sum / 29).margin(1e-6));
  }
}

TEST_CASE("logits of centred keys are right under soft caps and learned sinks", "[key_index]") {
  random_source random(base_seed() + 8);
  problem p(2, 3, 16, 1, {200, 40});
  for (float& q : p.queries) q = random.normal();
  for (index_t s = 0; s < 2; ++s) {
    const index_t half = p.lengths[size(s)] / 2;
    for (index_t h = 0; h < 2; ++h) {
      for (index_t t = 0; t < half; ++t) {
        for (index_t d = 0; d < 16; ++d) {
          // Every key has a -7.5 and a 7.5 around the centre, so steps are 1; the other half of the
          // tokens are their mirror images, so that the centre is exact.
          const float x =
              d < 2 ? (d == 0 ? -7.5f : 7.5f) : static_cast<float>(random.between(0, 15)) - 7.5f;
          const float centre = d == 3 ? 24 : static_cast<float>(d) / 4;
          p.keys.at(s, h, t, d) = centre + x;
          p.keys.at(s, h, half + t, d) = centre - x;
        }
      }
    }
  }
  p.soft_cap = 20;
  p.sink_logits = {5, 9, 4, 12, 6, 7};
  const dense_cache<float> cache(p.keys);
  estimates memory(cache.source(), p.lengths, 4, true);
  REQUIRE(quantise(divided<1>(), cache.source(), memory.keys()) == status::ok);
  check_same_choice(p, cache, memory);
}

TEST_CASE("centres keep the attention of keys with a large shared component", "[key_index]") {
  random_source random(base_seed() + 9);
  problem p(2, 2, 64, 1, {1000});
  for (float& q : p.queries) q = random.normal(2);
  for (float& k : p.keys.values[0]) k = random.normal();
  share_component(p.keys, 100);
  const dense_cache<float> cache(p.keys);
  const reference::attention_rows attention = reference::attend(p, 0);
  // The true attention of what is kept, of the head with the least, given how far off logits are.
  struct outcome {
    double mass = 1, error = 0;
    bool drops = true;
  };
  const auto run = [&](bool centred) {
    estimates memory(cache.source(), p.lengths, 4, centred);
    REQUIRE(quantise(divided<1>(), cache.source(), memory.keys()) == status::ok);
    const auto layer = observe(p.query_view(), memory.keys(), p.info());
    const ranked_selection kept = run_ranked(policy::twilight{.mass = 0.95}, divided<1>(), layer);
    REQUIRE(kept.status == status::ok);
    outcome out;
    for (index_t q_head = 0; q_head < p.q_heads(); ++q_head) {
      double mass = 0;
      for (const position_t t : kept.at(0, q_head / p.group)) mass += attention.at(q_head, 0, t);
      out.mass = std::min(out.mass, mass);
      double least = 0, most = 0;
      for (index_t t = 0; t < 1000; ++t) {
        const std::vector<double> estimate = memory.key(0, q_head / p.group, t);
        double error = 0;
        for (index_t d = 0; d < p.head_dim; ++d) {
          error += (estimate[size(d)] - double{p.key(0, q_head / p.group, t, d)}) *
                   double{p.query(0, 0, q_head, d)} / 8;
        }
        least = t == 0 ? error : std::min(least, error);
        most = t == 0 ? error : std::max(most, error);
      }
      out.error = std::max(out.error, most - least);
    }
    for (const auto& count : kept.counts) out.drops = out.drops && count.dropped() > 100;
    return out;
  };
  const outcome centred = run(true), plain = run(false);
  CAPTURE(centred.mass, centred.error, plain.mass, plain.error);
  // What is dropped has 0.05 of the estimated attention; a token's true one is e^error larger.
  CHECK(centred.mass >= 1 - 0.05 * std::exp(centred.error));
  CHECK(centred.mass >= 0.93);
  CHECK(centred.drops);
  CHECK(plain.mass < 0.5);  // else the keys would ask for no centres
}

TEST_CASE("pages that a sliding window hides take no place", "[key_index]") {
  problem p(1, 1, 4, 1, {64});
  p.query(0, 0, 0, 0) = 1;
  // The pages that the query does not see have the largest keys.
  for (index_t t = 0; t < 64; ++t) p.keys.at(0, 0, t, 0) = t < 48 ? 9.0f : 0.0f;
  p.sliding_window = 16;
  const dense_cache<float> cache(p.keys);
  estimates memory(cache.source(), p.lengths, 4);
  REQUIRE(bound_pages(divided<1>(), cache.source(), memory.page_bounds()) == status::ok);
  const auto layer =
      with_pages(observe(p.query_view(), cache.source(), p.info()), memory.page_bounds());
  const ranked_selection s =
      run_ranked(policy::twilight{.mass = 1, .selector_budget = 8}, divided<1>(), layer);
  REQUIRE(s.status == status::ok);
  CHECK(s.at(0) == std::vector<position_t>{48, 49, 50, 51, 52, 53, 54, 55});
}

TEST_CASE("an index of another shape is refused", "[key_index]") {
  const plain_rows rows = random_rows(base_seed() + 4), other = random_rows(base_seed() + 4, 8);
  const dense_cache<float> cache(rows), wider(other);
  estimates memory(cache.source(), rows.lengths, 4);
  const auto no_quantise = [](const auto& source, const int4_keys<>& to) {
    const char* why = why_invalid(source, to);
    CHECK((quantise(divided<1>(), source, to) == status::ok) == (why == nullptr));
    return why == nullptr ? std::string() : std::string(why);
  };
  const auto no_bounds = [](const auto& source, const page_bounds<>& to) {
    const char* why = why_invalid(source, to);
    CHECK((bound_pages(divided<1>(), source, to) == status::ok) == (why == nullptr));
    return why == nullptr ? std::string() : std::string(why);
  };
  CHECK(no_quantise(wider.source(), memory.keys()) == "keys and index differ in head_dim");
  CHECK(no_bounds(wider.source(), memory.page_bounds()) == "keys and index differ in head_dim");
  int4_keys<> keys = memory.keys();
  keys.dims = 9;
  CHECK(no_quantise(cache.source(), keys) != "");
  std::vector<float> centres(4 * 2 * 7);
  keys = memory.keys();
  keys.centres = {centres.data(), {4, 2, 6}};
  CHECK(no_quantise(cache.source(), keys) != "");
  keys.centres = {centres.data(), {4, 1, 7}};
  CHECK(no_quantise(cache.source(), keys) != "");
  keys.centres = {centres.data(), {4, 2, 7}, {14, 1, 2}};
  CHECK(no_quantise(cache.source(), keys) != "");
  keys.centres = {nullptr, {4, 2, 7}};
  CHECK(no_quantise(cache.source(), keys) != "");
  page_bounds<> bounds = memory.page_bounds();
  bounds.page_tokens = 0;
  CHECK(no_bounds(cache.source(), bounds) != "");
  bounds.page_tokens = 4;
  bounds.bounds = {bounds.bounds.data(), {4, 2, 7, 2, 7}};  // of 8 pages
  CHECK(no_bounds(cache.source(), bounds) != "");
  const position_t before[] = {-1, 0, 0, 0};
  CHECK(quantise(divided<1>(), cache.source(), memory.keys(), {before, {4}}) ==
        status::invalid_argument);
}
