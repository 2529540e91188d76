// SPDX-License-Identifier: Apache-2.0
#include "refreekv/core/status.hpp"

#include <set>
#include <string>

#include "catch.hpp"

using refreekv::status;

TEST_CASE("every status has words of its own", "[status]") {
  std::set<std::string> words;
  for (const status s : {status::ok, status::invalid_argument, status::small_workspace,
                         status::device_error, static_cast<status>(99)}) {
    words.insert(refreekv::to_string(s));
  }
  CHECK(words.size() == 5);
}
