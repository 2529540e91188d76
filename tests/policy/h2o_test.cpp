// SPDX-License-Identifier: Apache-2.0
#include "refreekv/policy/h2o.hpp"

#include "layouts.hpp"
#include "ranked_selection.hpp"

using namespace refreekv;

namespace {

/// One layer that decodes: its keys and scores. Each step drops tokens from both.
class decoder {
 public:
  explicit decoder(index_t prompt)
      : length_(static_cast<position_t>(prompt)),
        keys_(size(kv_heads * capacity * dim)),
        scores_(size(kv_heads * capacity)) {
    for (index_t t = 0; t < prompt; ++t) write_key(t);
  }

  /// Appends a token and returns the kept tokens of each KV head. The query is random; if `bad`,
  /// it has a NaN.
  ranked_selection step(const policy::h2o& policy, bool bad) {
    REQUIRE(length_ < capacity);
    write_key(length_++);
    std::vector<float> query(size(2 * kv_heads * dim));
    for (float& q : query) q = random_.normal(2);
    if (bad) query[3] = std::numeric_limits<float>::quiet_NaN();
    const auto layer =
        with_scores(observe(view<const float, 4>(query.data(), {1, 1, 2 * kv_heads, dim}),
                            dense(keys(), lengths())),
                    scores());
    const ranked_selection kept = run_ranked(policy, divided<2>(), layer);
    REQUIRE(kept.status == status::ok);
    for (index_t h = 0; h < kv_heads; ++h) {
      for (std::size_t i = 0; i < kept.at(0, h).size(); ++i) {
        const index_t from = kept.at(0, h)[i], to = static_cast<index_t>(i);
        scores()(0, h, to) = scores()(0, h, from);
        for (index_t d = 0; d < dim; ++d) keys()(0, h, to, d) = keys()(0, h, from, d);
      }
    }
    length_ = kept.counts[0].count;
    return kept;
  }

  std::vector<float> scores_of(index_t head) {
    const float* first = scores().at(0, head);
    return {first, first + length_};
  }

  static constexpr index_t kv_heads = 2, dim = 8, capacity = 40;

 private:
  view<float, 4> keys() { return {keys_.data(), {1, kv_heads, capacity, dim}}; }
  view<float, 3> scores() { return {scores_.data(), {1, kv_heads, capacity}}; }
  lengths_view<> lengths() const { return {&length_, {1}}; }
  void write_key(index_t t) {
    for (index_t h = 0; h < kv_heads; ++h) {
      for (index_t d = 0; d < dim; ++d) keys()(0, h, t, d) = random_.normal();
      scores()(0, h, t) = 0;
    }
  }

  random_source random_{base_seed()};
  position_t length_;
  std::vector<float> keys_, scores_;
};

}  // namespace

TEST_CASE("a row of NaN keeps everything once, and eviction goes on", "[h2o]") {
  const policy::h2o policy{.budget = 12, .recent = 6};
  decoder layer(12);
  for (int step = 0; step < 50; ++step) {
    INFO("REFREEKV_SEED=" << base_seed() << " step " << step);
    const bool bad = step % 10 == 3;
    std::vector<float> before = layer.scores_of(0), other = layer.scores_of(1);
    const ranked_selection kept = layer.step(policy, bad);
    for (const kept_tokens& count : kept.counts) {
      CHECK(count.undecided == bad);
      CHECK(count.count == (bad ? count.tokens : 12));
    }
    if (!bad) continue;
    // A row with a NaN adds nothing to the scores of its own KV head. The other KV head's row has
    // no NaN and is added as usual.
    before.push_back(0);
    other.push_back(0);
    CHECK(layer.scores_of(0) == before);
    CHECK(layer.scores_of(1) != other);
    for (const float score : layer.scores_of(1)) CHECK(std::isfinite(score));
  }
}
