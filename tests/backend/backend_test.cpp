// SPDX-License-Identifier: Apache-2.0
#include "refreekv/backend/backend.hpp"

#include "layouts.hpp"
#include "selection.hpp"

namespace {

/// A backend of somebody else's: the CPU's, with one primitive replaced.
struct silent_backend : refreekv::cpu_backend<> {};

}  // namespace

template <>
struct refreekv::ops<silent_backend> : refreekv::ops<refreekv::cpu_backend<>> {
  template <refreekv::kv_source Source>
  static status compact(const silent_backend&, const Source&, view<const kept_range, 2>,
                        compaction) noexcept {
    return status::device_error;
  }
};

TEST_CASE("a backend is what has the trait", "[backend]") {
  STATIC_REQUIRE(refreekv::backend<refreekv::cpu_backend<>>);
  STATIC_REQUIRE(refreekv::backend<refreekv::cpu_backend<refreekv::thread_pool>>);
  STATIC_REQUIRE(refreekv::backend<silent_backend>);
  STATIC_REQUIRE_FALSE(refreekv::backend<int>);
}

TEST_CASE("specialising the trait is all that a backend needs", "[backend]") {
  random_source random(base_seed());
  problem p(2, 2, 16, 1, {300});
  fill(p, random);
  const dense_cache<float> keys(p.keys);
  const auto layer = refreekv::observe(p.query_view(), keys.source(), p.info());
  const refreekv::policy::refreekv policy;
  CHECK(run_select(policy, silent_backend{}, layer).at(0) ==
        run_select(policy, refreekv::cpu_backend{}, layer).at(0));

  std::vector<std::byte> scratch(refreekv::workspace_size(policy, silent_backend{}, layer));
  refreekv::kept_range kept;
  CHECK(refreekv::prune(policy, silent_backend{}, layer, {&kept, {1, 1}}, scratch,
                        refreekv::compaction::sinks_up) == refreekv::status::device_error);
}
