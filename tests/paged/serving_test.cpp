// SPDX-License-Identifier: Apache-2.0
// C lives in the pages that A returned, and nobody notices.
#include "serving.hpp"

#include <stdexcept>
#include <string>

#include "catch.hpp"
#include "tiny_model.hpp"

using namespace paged;

namespace {

std::vector<int> after(std::vector<int> prefix, std::size_t count, unsigned seed) {
  const std::vector<int> more = random_tokens(count, seed);
  prefix.insert(prefix.end(), more.begin(), more.end());
  return prefix;
}

}  // namespace

TEST_CASE("three sequences share a pool and have the logits that they have alone") {
  const tiny_model model;
  const std::size_t page_tokens = GENERATE(1u, 8u, 16u);
  using namespace refreekv::policy;
  const page_policy policy = GENERATE(values<page_policy>(
      {refreekv::policy::refreekv{.threshold = 0.3, .window = 4, .full_layers = 0},
       refreekv::policy::refreekv{.threshold = 0.6, .window = 4, .full_layers = 0},
       faithful{.tolerance = 0.3, .window = 4}, faithful{.tolerance = 0.3, .stand_ins = false},
       faithful{.tolerance = 0.3, .sinks = 90, .error_term = false}}));
  CAPTURE(page_tokens, policy.index());
  const std::vector<int> prefix = random_tokens(70, 1);
  serving_plan plan{
      after(prefix, 200, 2), after(prefix, 30, 3), random_tokens(20, 4), 12, page_tokens, policy};
  plan.b[70] = (plan.a[70] + 1) % 11;  // there they part
  const serving_result run = serve(model.network, plan, {});
  CHECK(run.shared_tokens == 70 / page_tokens * page_tokens);
  CHECK(run.free_before == 0);
  CHECK(run.returned() > 0);
  const auto* faithful_policy = std::get_if<faithful>(&policy);
  CHECK((share_of(&page_release::stand_ins, run.releases) > 0) ==
        (faithful_policy != nullptr && faithful_policy->stand_ins));
  CHECK(share_of(&page_release::kept, run.releases) < 1);
  CHECK(run.returned_to_c == run.needed_by_c);
  CHECK(run.free_at_end == run.free_after - run.needed_by_c);
  CHECK((run.a.tokens.size() == 12 && run.b.tokens.size() == 12 && run.c.tokens.size() == 6));
  const char* wrong = run.wrong();
  CHECK(std::string(wrong == nullptr ? "" : wrong) == "");
}

TEST_CASE("what does not fit is refused in words") {
  const tiny_model model;
  const std::vector<int> prefix = random_tokens(70, 1);
  serving_plan plan{after(prefix, 200, 2),
                    after(prefix, 30, 3),
                    random_tokens(390, 4),
                    2,
                    8,
                    refreekv::policy::refreekv{.threshold = 0.3, .full_layers = 0}};
  CHECK_THROWS_WITH(serve(model.network, plan, {}), Catch::Contains("do not fit into"));
  plan.b = {};
  plan.b.assign(50, (plan.a[0] + 1) % 11);
  CHECK_THROWS_WITH(serve(model.network, plan, {}), "A and B share no whole page");
}
