// SPDX-License-Identifier: Apache-2.0
#include "plan.hpp"

#include <algorithm>

#include "catch.hpp"

using namespace evaluate;

namespace {

std::vector<std::string> names_of(const std::vector<planned_row>& rows) {
  std::vector<std::string> names;
  for (const planned_row& row : rows) {
    names.push_back(row.entry->method + "|" + row.entry->options + "|" + row.budget);
  }
  return names;
}

}  // namespace

TEST_CASE("every policy of the library is in the catalogue", "[evaluate]") {
  const std::vector<std::string> names = method_names();
  std::apply(
      [&](const auto&... policy) {
        for (const std::string& name : {std::string(policy.name)...}) {
          CAPTURE(name);
          CHECK(std::find(names.begin(), names.end(), name) != names.end());
        }
      },
      refreekv::all_policies{});
}

TEST_CASE("rows without a budget have names", "[evaluate]") {
  REQUIRE(find_adaptive("refreekv") != nullptr);
  CHECK(find_adaptive("refreekv")->options == "the default: 1 %, last row");
  REQUIRE(find_adaptive("refreekv, window 16 frobenius") != nullptr);
  CHECK(find_adaptive("refreekv, window 16 frobenius")->options == "window 16 frobenius");
  CHECK(find_adaptive("none")->method == "none");
  for (const char* name : {"", "tova", "snapkv", "refreekv, window 17", "twilight"}) {
    CAPTURE(name);
    CHECK(find_adaptive(name) == nullptr);
  }
}

TEST_CASE("what budgets refer to has a row", "[evaluate]") {
  options opts;
  opts.methods = {"tova"};
  opts.budgets = {{"20 %", 0.2, nullptr}, {"its size", 1, find_adaptive("refreekv")}};
  const std::vector<planned_row> rows = plan(opts);
  CHECK(names_of(rows) == std::vector<std::string>{"tova||20 %", "tova||its size",
                                                   "refreekv|the default: 1 %, last row|"});
  CHECK(rows[0].share == 0.2);
  CHECK_FALSE(rows[0].reference);
  CHECK(rows[1].reference == 2);
  CHECK_FALSE(rows[2].reference);
}

TEST_CASE("nothing is added where no row needs a budget", "[evaluate]") {
  options opts;
  opts.methods = {"twilight"};
  opts.budgets = {{"its size", 1, find_adaptive("refreekv")}};
  for (const planned_row& row : plan(opts)) CHECK(row.entry->method == "twilight");
}

TEST_CASE("the widest window of the rows is recorded", "[evaluate]") {
  options opts;
  opts.methods = {"tova"};
  opts.budgets = {{"20 %", 0.2, nullptr}};
  CHECK(window_of(plan(opts), 1000) == 1);
  opts.methods = {"tova", "snapkv"};
  CHECK(window_of(plan(opts), 1000) == 32);
}
