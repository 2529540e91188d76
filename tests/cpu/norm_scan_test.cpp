// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/norm_scan.hpp"

#include "catch.hpp"
#include "layouts.hpp"

using namespace refreekv;

TEST_CASE("every chunk of every KV head is read once, whatever the lengths", "[cpu][norm_scan]") {
  const plain_rows rows(3, 4, {5000, 0, 4, 261, 260});
  const dense_cache<float> keys(rows);
  const auto layer = observe(keys.source());
  const index_t expected = 3 * (21 + 1 + 1 + 3 + 2);
  for (const int threads : {1, 2, 7, 200}) {
    const thread_pool pool(threads);
    std::vector<std::vector<cpu_detail::chunk_index>> visits(size(threads)), announced = visits;
    cpu_detail::for_each_chunk(pool, layer, 4, [&](int w, const auto& at, const auto& next) {
      visits[size(w)].push_back(at);
      announced[size(w)].push_back(next);
    });
    index_t count = 0;
    const auto order = [&](const cpu_detail::chunk_index& i) {
      return (i.sequence * 1000 + i.chunk) * 1000 + i.kv_head;
    };
    index_t last = -1;
    for (int w = 0; w < threads; ++w) {
      const auto& of_worker = visits[size(w)];
      for (std::size_t i = 0; i < of_worker.size(); ++i) {
        CHECK(order(of_worker[i]) > last);
        last = order(of_worker[i]);
        CHECK(of_worker[i].chunk < chunking{rows.lengths[size(of_worker[i].sequence)], 4}.count());
        const std::size_t after = std::min(i + 1, of_worker.size() - 1);
        CHECK(order(announced[size(w)][i]) == order(of_worker[after]));
      }
      count += static_cast<index_t>(of_worker.size());
    }
    CHECK(count == expected);
  }
}

TEST_CASE("a dominant sink does not drown the candidates", "[cpu][norm_scan]") {
  // The sink's logit is 300 above the others': candidates have attention of 1e-130 each.
  problem p(1, 1, 2, 1, {500});
  p.scale = 1;
  p.query(0, 0, 0, 0) = 1;
  for (index_t t = 0; t < 500; ++t) p.keys.at(0, 0, t, 0) = t == 0 ? 300.0f : 0.0f;
  const dense_cache<float> keys(p.keys);
  const auto layer = observe(p.query_view(), keys.source(), p.info());
  const policy::refreekv policy{.threshold = 0.5};
  std::vector<std::byte> scratch(workspace_size(policy, cpu_backend{}, layer));
  kept_range kept;
  REQUIRE(select(policy, cpu_backend{}, layer, view(&kept, {1, 1}), scratch) == status::ok);
  // Uniform over 496 candidates: a quarter of them, 124, hold half of the norm.
  CHECK(kept.length() == 4 + 124);
}
