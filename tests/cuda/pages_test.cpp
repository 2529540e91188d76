// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cuda/pages.hpp"

#include "catch.hpp"
#include "emulated_backend.hpp"
#include "page_batch.hpp"

using namespace refreekv;

TEMPLATE_TEST_CASE("kernels plan and release pages as the CPU does", "[cuda][release]",
                   std::int32_t, std::int64_t) {
  unsigned seed = base_seed();
  for (const index_t page_tokens : {1, 3, 16}) {
    for (const sharing how :
         {sharing::unknown, sharing::none, sharing::prefixes, sharing::some, sharing::all}) {
      for (const index_t most_pages : {3, 60, 900}) {
        CAPTURE(page_tokens, static_cast<int>(how), most_pages);
        random_source random(++seed), same(seed);
        page_batch<TestType> expected(random, page_tokens, 12, most_pages, how);
        page_batch<TestType> batch(same, page_tokens, 12, most_pages, how);
        const cpu_backend cpu;
        REQUIRE(plan_pages(cpu, expected.kept.get(), page_tokens, expected.plan(),
                           expected.shared) == status::ok);
        REQUIRE(release_pages(cpu, expected.plan().plans, expected.table(), expected.freed(),
                              expected.shared) == status::ok);
        const emulation::emulated_backend device{seed % 10};
        REQUIRE(cuda_detail::plan_pages(device, view<const kept_range, 2>(batch.kept.get()),
                                        page_tokens, batch.shared, batch.plan()) == status::ok);
        REQUIRE(cuda_detail::release_pages(device, view<const page_plan, 1>(batch.plan().plans),
                                           batch.shared, batch.table(),
                                           batch.freed()) == status::ok);
        CHECK(batch == expected);
      }
    }
  }
}

TEMPLATE_TEST_CASE("kernels write masks as the CPU does", "[cuda][release]", std::uint8_t, float,
                   bf16_bits) {
  random_source random(base_seed());
  const auto value = [](float x) { return to_element<TestType>(x); };
  const TestType keep = value(1), drop = value(2), canary = value(3);
  const index_t groups = GENERATE(1, 3), longest = 4500, sequences = 6;
  std::vector<kept_range> ranges;
  std::vector<kept_tokens> counts;
  std::vector<position_t> positions(size(sequences * groups * longest), -1);
  for (const position_t tokens : {4500, 0, 1, 2048, 2049, 100}) {
    for (index_t g = 0; g < groups; ++g) {
      const auto cut = static_cast<position_t>(random.between(0, tokens));
      ranges.push_back({static_cast<position_t>(random.between(0, cut)), cut, tokens});
      position_t* row = &positions[counts.size() * size(longest)];
      counts.push_back({0, tokens});
      const double share = random.one_of({0.0, 0.001, 0.5, 1.0});
      for (position_t t = 0; t < tokens; ++t) {
        if (random.chance(share)) row[counts.back().count++] = t;
      }
    }
  }
  const view<const kept_range, 2> kept(ranges.data(), {sequences, groups});
  const kept_positions<> tokens{{positions.data(), {sequences, groups, longest}},
                                {counts.data(), {sequences, groups}}};
  for (const index_t room : {0, 1, 700}) {
    guarded_rows<TestType> by_range(sequences * groups, longest + room, canary);
    guarded_rows<TestType> by_position = by_range, device_range = by_range,
                           device_position = by_range;
    const emulation::emulated_backend device{static_cast<unsigned>(room)};
    CHECK(write_masks(cpu_backend{}, kept, by_range.in_groups(groups), keep, drop) == status::ok);
    CHECK(write_masks(cpu_backend{}, tokens, by_position.in_groups(groups), keep, drop) ==
          status::ok);
    CHECK(cuda_detail::write_masks(device, kept, device_range.in_groups(groups), keep, drop) ==
          status::ok);
    CHECK(cuda_detail::write_masks(device, tokens, device_position.in_groups(groups), keep, drop) ==
          status::ok);
    CHECK(device_range == by_range);
    CHECK(device_position == by_position);
  }
}

TEST_CASE("a mask that is shorter than its sequence is cut off", "[cuda][release]") {
  const kept_range range{1, 3000, 4000};
  std::vector<position_t> positions{0};
  for (position_t t = 3000; t < 4000; ++t) positions.push_back(t);
  kept_tokens count{range.length(), 4000};
  guarded_rows<std::uint8_t> by_range(1, 3100, 7), by_position = by_range;
  const emulation::emulated_backend device;
  CHECK(cuda_detail::write_masks(device, view<const kept_range, 2>(&range, {1, 1}),
                                 by_range.in_groups(1), std::uint8_t{1},
                                 std::uint8_t{0}) == status::ok);
  CHECK(cuda_detail::write_masks(
            device, kept_positions<>{{positions.data(), {1, 1, 1001}}, {&count, {1, 1}}},
            by_position.in_groups(1), std::uint8_t{1}, std::uint8_t{0}) == status::ok);
  CHECK(by_range.intact());
  CHECK(by_range == by_position);
  for (index_t t = 0; t < 3100; ++t) REQUIRE(by_range.get()(0, t) == (range.keeps(t) ? 1 : 0));
}

TEST_CASE("kernels release nothing of an empty batch", "[cuda][release]") {
  const emulation::emulated_backend device;
  CHECK(cuda_detail::plan_pages(device, view<const kept_range, 2>(nullptr, {0, 1}), 16,
                                shared_pages_view<>{}, page_plans<>{}) == status::ok);
  CHECK(cuda_detail::release_pages(device, view<const page_plan, 1>{}, shared_pages_view<>{},
                                   page_lists<std::int32_t>{},
                                   page_lists<std::int32_t>{}) == status::ok);
  CHECK(cuda_detail::write_masks(device, kept_positions<>{}, view<float, 3>{}, 0.0f, 1.0f) ==
        status::ok);
}
