// SPDX-License-Identifier: Apache-2.0
#include "refreekv/policy/budget.hpp"

#include "catch.hpp"

using refreekv::count_t;
using refreekv::token_budget;

TEST_CASE("a budget is a number of tokens, or a share of them", "[budget]") {
  CHECK(token_budget(2048).of(10) == 2048);
  CHECK(token_budget(0).of(10) == 0);
  CHECK(token_budget::share(0.9).of(1000) == 900);
  CHECK(token_budget::share(0).of(1000) == 0);
  CHECK(token_budget::share(1).of(1000) == 1000);
  // From halfway to the even number, as Python rounds.
  CHECK(token_budget::share(0.5).of(5) == 2);
  CHECK(token_budget::share(0.5).of(7) == 4);
  // A share above 0 is at least one token.
  CHECK(token_budget::share(0.2).of(2) == 1);
  CHECK(token_budget::share(0.2).of(0) == 0);
}

TEST_CASE("a budget shows what it was made of", "[budget]") {
  static_assert(token_budget(2048).amount() == 2048 && !token_budget(2048).is_share());
  static_assert(token_budget::share(0.25).amount() == 0.25 && token_budget::share(0.25).is_share());
}

TEST_CASE("budgets outside their range are invalid", "[budget]") {
  CHECK(token_budget(refreekv::max_count).valid());
  CHECK_FALSE(token_budget(static_cast<count_t>(-1)).valid());
  CHECK(token_budget::share(0).valid());
  CHECK(token_budget::share(1).valid());
  CHECK_FALSE(token_budget(-1).valid());
  CHECK_FALSE(token_budget((std::int64_t{1} << 32) + 7).valid());
  static_assert(!std::is_convertible_v<double, token_budget>);
  CHECK_FALSE(token_budget::share(1.01).valid());
  CHECK_FALSE(token_budget::share(-0.5).valid());
  CHECK_FALSE(token_budget::share(std::nan("")).valid());
}
