// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cache/paged.hpp"

#include <vector>

#include "catch.hpp"

using namespace refreekv;

namespace {
std::string why(const char* reason) { return reason == nullptr ? "" : reason; }
}  // namespace

TEST_CASE("page tables that cannot be are refused in words", "[paged]") {
  std::vector<float> data(1000);
  const position_t good[] = {10, 0};
  const view pool(data.data(), {5, 1, 4, 4});
  const auto table = [](std::initializer_list<std::int32_t> ids, const position_t* lengths) {
    static std::vector<std::int32_t> kept;
    kept = ids;
    return page_table<std::int32_t>::padded({kept.data(), {2, 3}}, {lengths, {2}});
  };
  CHECK(why(paged(pool, table({4, 0, 1, -1, -1, -1}, good)).invalid()) == "");
  CHECK(why(paged(pool, table({5, 0, 1, 2, 2, 2}, good)).invalid()).find("a page id") == 0);
  CHECK(why(paged(pool, table({4, 0, -1, 2, 2, 2}, good)).invalid()).find("a page id") == 0);
  const position_t over[] = {13, 0};
  CHECK(why(paged(pool, table({4, 0, 1, 2, 2, 2}, over)).invalid()).find("a length") == 0);
  CHECK(why(paged(view(data.data(), {5, 1, 0, 4}), table({0, 0, 0, 0, 0, 0}, good)).invalid())
            .find("a page must") == 0);

  const std::int32_t ids[] = {3, 1, 2}, offsets[] = {0, 2, 3}, falling[] = {0, 2, 1};
  const position_t last[] = {4, 1}, none[] = {0, 1};
  const auto ragged = [&](const std::int32_t* o, const position_t* l, index_t most) {
    return paged(pool, page_table<std::int32_t>::ragged({ids, {3}}, {o, {3}}, {l, {2}}, most));
  };
  CHECK(why(ragged(offsets, last, 2).invalid()) == "");
  CHECK(ragged(offsets, last, 2).tokens(0) == 8);
  CHECK(why(ragged(falling, last, 2).invalid()).find("page offsets") == 0);
  CHECK(why(ragged(offsets, none, 2).invalid()).find("last_page_tokens") == 0);
  CHECK(why(ragged(offsets, last, 1).invalid()).find("a sequence has more pages") == 0);
  for (const index_t most : {index_t{-1}, index_t{1} << 29, index_t{1} << 60}) {
    CHECK(why(ragged(offsets, last, most).invalid()).find("a sequence may have") == 0);
  }
  const auto without_offsets = page_table<std::int32_t>::ragged({ids, {3}}, {}, {last, {1}}, 3);
  CHECK(why(paged(pool, without_offsets).invalid()).find("page table and lengths") == 0);
}
