// SPDX-License-Identifier: Apache-2.0
#include "refreekv/pages.hpp"

#include "catch.hpp"
#include "page_batch.hpp"
#include "refreekv/masks.hpp"
#include "selection.hpp"
#include "test_backend.hpp"

using namespace refreekv;

namespace {

/// Calls f(batch) for random batches of every kind.
template <class Index, class F>
void for_each_batch(unsigned seed, const F& f) {
  for (const index_t page_tokens : {1, 3, 16}) {
    for (const sharing how :
         {sharing::unknown, sharing::none, sharing::prefixes, sharing::some, sharing::all}) {
      for (const index_t most_pages : {3, 12, 60}) {
        CAPTURE(page_tokens, static_cast<int>(how), most_pages);
        random_source random(seed++);
        page_batch<Index> batch(random, page_tokens, 20, most_pages, how);
        f(batch);
      }
    }
  }
}

/// Positions that a range keeps.
std::vector<position_t> positions_of(const kept_range& kept) {
  std::vector<position_t> positions;
  for (position_t t = 0; t < kept.tokens; ++t) {
    if (kept.keeps(t)) positions.push_back(t);
  }
  return positions;
}

template <class T>
std::vector<T> row_of(const page_lists<T>& lists, index_t sequence) {
  return {lists.ids.at(sequence), lists.ids.at(sequence) + lists.counts(sequence)};
}

}  // namespace

TEMPLATE_TEST_CASE("a batch's masks say what stays, and nothing past the end of a sequence",
                   "[release]", std::uint8_t, float, double, f16_bits) {
  random_source random(base_seed());
  const auto value = [](float x) { return to_element<TestType>(x); };
  const TestType keep = value(1), drop = value(2), canary = value(3);
  const index_t groups = GENERATE(1, 3), longest = 300, room = GENERATE(0, 9);
  std::vector<kept_range> ranges;
  std::vector<kept_tokens> counts;
  std::vector<position_t> positions(size(5 * groups * longest), -1);
  for (const position_t tokens : {300, 0, 1, 77, 300}) {
    for (index_t g = 0; g < groups; ++g) {
      const auto cut = static_cast<position_t>(random.between(0, tokens));
      ranges.push_back({static_cast<position_t>(random.between(0, cut)), cut, tokens});
      const std::vector<position_t> stay = positions_of(ranges.back());
      std::copy(stay.begin(), stay.end(),
                positions.begin() + static_cast<index_t>(counts.size()) * longest);
      counts.push_back({ranges.back().length(), tokens});
    }
  }
  guarded_rows<TestType> expected(5 * groups, longest + room, canary), by_range = expected,
                                                                       by_position = expected;
  for (index_t i = 0; i < 5 * groups; ++i) {
    const kept_range& k = ranges[size(i)];
    write_mask(k, expected.get().at(i), keep, drop);
    for (index_t t = k.tokens; t < longest + room; ++t) expected.get()(i, t) = drop;
  }
  CHECK(write_masks(divided<2>(), {ranges.data(), {5, groups}}, by_range.in_groups(groups), keep,
                    drop) == status::ok);
  CHECK(by_range == expected);
  const kept_positions<> kept{{positions.data(), {5, groups, longest}},
                              {counts.data(), {5, groups}}};
  CHECK(write_masks(divided<2>(), kept, by_position.in_groups(groups), keep, drop) == status::ok);
  CHECK(by_position == expected);
}

TEST_CASE("masks of booleans, and of no tokens or sequences", "[release]") {
  const kept_range kept{1, 3, 4};
  bool mask[5] = {false, true, true, false, true};
  CHECK(write_masks(divided<1>(), {&kept, {1, 1}}, view<bool, 3>(mask, {1, 1, 5}), true, false) ==
        status::ok);
  CHECK(std::vector<bool>(mask, mask + 5) == std::vector<bool>{true, false, false, true, false});
  const kept_range nothing{};
  CHECK(write_masks(divided<1>(), {&nothing, {1, 1}}, view<bool, 3>(mask, {1, 1, 0}), true,
                    false) == status::ok);
  CHECK(write_masks(divided<1>(), {&nothing, {0, 1}}, view<bool, 3>(mask, {0, 1, 5}), true,
                    false) == status::ok);
  CHECK(mask[0]);
}

TEST_CASE("masks that do not fit are refused", "[release]") {
  const auto exec = divided<1>();
  const kept_range good{1, 3, 4}, bad{3, 1, 4}, negative{-1, 3, 4};
  guarded_rows<float> rows(2, 4, 7.0f);
  const view<float, 3> mask = rows.in_groups(2);
  const auto refused = [&](const kept_range& a, const kept_range& b, const view<float, 3>& to) {
    const kept_range both[] = {a, b};
    return write_masks(exec, {both, {1, 2}}, to, 0, 1) == status::invalid_argument &&
           why_invalid({both, {1, 2}}, to, 0, 1) != nullptr && rows.unwritten();
  };
  CHECK(refused(good, bad, mask));
  CHECK(refused(negative, good, mask));
  CHECK(refused(good, {1, 3, 5}, mask));                            // longer
  CHECK(refused(good, good, {mask.data(), {1, 1, 4}}));             // groups
  CHECK(refused(good, good, {mask.data(), {2, 2, 4}}));             // sequences
  CHECK(refused(good, good, {mask.data(), {1, 2, 3}, {8, 4, 2}}));  // not contiguous
  CHECK(refused(good, good, {static_cast<float*>(nullptr), {1, 2, 4}}));

  position_t positions[] = {0, 3};
  kept_tokens counts[] = {{1, 4}, {1, 4}};
  const auto positions_refused = [&] {
    const kept_positions<> kept{{positions, {1, 2, 1}}, {counts, {1, 2}}};
    const bool is_refused = write_masks(exec, kept, mask, 0, 1) == status::invalid_argument;
    CHECK((why_invalid(kept, mask, 0, 1) != nullptr) == is_refused);
    return is_refused && rows.unwritten();
  };
  counts[1] = {2, 4};  // more than there is room for
  CHECK(positions_refused());
  counts[1] = {-1, 4};
  CHECK(positions_refused());
  counts[1] = {1, 5};
  CHECK(positions_refused());
  counts[1] = {1, 3};  // position 3
  CHECK(positions_refused());
  counts[1] = {1, 4};
  CHECK_FALSE(positions_refused());
}

TEMPLATE_TEST_CASE("plans and tables of a batch are those of its sequences", "[release]",
                   std::int32_t, std::int64_t) {
  for_each_batch<TestType>(base_seed(), [](page_batch<TestType>& batch) {
    const auto plan = batch.plan();
    REQUIRE(plan_pages(divided<2>(), batch.kept.get(), batch.page_tokens, plan, batch.shared) ==
            status::ok);
    std::vector<std::vector<TestType>> left, freed;
    for (index_t s = 0; s < batch.sequences; ++s) {
      const kept_range& kept = batch.kept.get()(s, 0);
      const shared_pages bits = batch.shared.data() == nullptr ? nullptr : batch.shared.at(s);
      const page_plan p = plan_pages(kept, batch.page_tokens, bits);
      CHECK((plan.plans(s).first == p.first && plan.plans(s).last == p.last));
      CHECK((plan.plans(s).freed == p.freed && plan.plans(s).sinks_move == p.sinks_move));
      CHECK(plan.plans(s).first_slot == p.first_slot);
      const kept_range& moves = plan.compact_ranges(s, 0);
      CHECK(moves.tokens == kept.tokens);
      if (p.sinks_move) {
        CHECK(moves == kept);
      } else {
        CHECK(moves.dropped() == 0);
      }
      left.push_back(row_of(batch.table(), s));
      freed.emplace_back(size(p.last - p.first));
      freed.back().resize(size(remove_pages(p, left.back().data(), batch.counts.column()(s),
                                            freed.back().data(), bits)));
      left.back().resize(left.back().size() - size(p.last - p.first));
    }
    REQUIRE(release_pages(divided<2>(), plan.plans, batch.table(), batch.freed(), batch.shared) ==
            status::ok);
    for (index_t s = 0; s < batch.sequences; ++s) {
      CHECK(row_of(batch.table(), s) == left[size(s)]);
      CHECK(row_of(batch.freed(), s) == freed[size(s)]);
    }
    CHECK(batch.intact());
  });
}

TEMPLATE_TEST_CASE("an engine that releases pages keeps what it should and no page twice",
                   "[release]", std::int32_t, std::int64_t) {
  int moved = 0, stayed = 0;
  for_each_batch<TestType>(base_seed() + 1, [&](page_batch<TestType>& batch) {
    const auto exec = divided<1>();
    const index_t page_tokens = batch.page_tokens, sequences = batch.sequences;
    const auto plan = batch.plan();
    const auto table = batch.table();
    // A slot holds the position of its token; -1 is nobody's.
    std::vector<position_t> slots(size(batch.pool_pages * page_tokens), -1);
    const auto slot = [&](index_t s, index_t t) -> position_t& {
      return slots[size(table.ids(s, t / page_tokens) * page_tokens + t % page_tokens)];
    };
    std::vector<position_t> lengths;
    std::vector<std::vector<TestType>> before;
    for (index_t s = 0; s < sequences; ++s) {
      lengths.push_back(batch.kept.get()(s, 0).tokens);
      before.push_back(row_of(table, s));
      for (position_t t = 0; t < lengths.back(); ++t) slot(s, t) = t;
    }
    const std::vector<position_t> slots_before = slots;
    const paged<position_t, TestType> cache(
        view<position_t, 4>(slots.data(), {batch.pool_pages, 1, page_tokens, 1}),
        page_table<TestType>::padded(table.ids, {lengths.data(), {sequences}}));

    REQUIRE(plan_pages(exec, batch.kept.get(), page_tokens, plan, batch.shared) == status::ok);
    REQUIRE(compact(exec, plan.compact_ranges, compaction::sinks_up, cache) == status::ok);
    REQUIRE(release_pages(exec, plan.plans, table, batch.freed(), batch.shared) == status::ok);

    for (index_t s = 0; s < sequences; ++s) {
      const kept_range &kept = batch.kept.get()(s, 0), &now = plan.mask_ranges(s, 0);
      CAPTURE(s, kept, now);
      CHECK((0 <= now.sinks && now.sinks <= now.cut && now.cut <= now.tokens));
      CHECK(now.length() == kept.length());
      CHECK(now.loss == kept.loss);
      const std::vector<TestType> left = row_of(table, s), freed = row_of(batch.freed(), s);
      REQUIRE(now.tokens <= static_cast<index_t>(left.size()) * page_tokens);
      std::vector<position_t> held;
      for (const position_t t : positions_of(now)) held.push_back(slot(s, t));
      CHECK(held == positions_of(kept));
      if (plan.plans(s).sinks_move) CHECK(now.cut < page_tokens);
      ++(plan.plans(s).sinks_move ? moved : stayed);

      // Every page is in the table, or freed, or was somebody else's, too.
      const page_plan& p = plan.plans(s);
      std::vector<TestType> gone(before[size(s)].begin() + p.first,
                                 before[size(s)].begin() + p.last);
      std::vector<TestType> all = left;
      all.insert(all.begin() + p.first, gone.begin(), gone.end());
      CHECK(all == before[size(s)]);
      std::size_t next = 0;
      for (index_t page = 0; page < static_cast<index_t>(before[size(s)].size()); ++page) {
        const TestType id = before[size(s)][size(page)];
        const bool is_freed = next < freed.size() && freed[next] == id;
        const bool shared = batch.shared.data() != nullptr && is_shared(batch.shared.at(s), page);
        CHECK(is_freed == (page >= p.first && page < p.last && !shared));
        next += is_freed ? 1 : 0;
        const auto first = slots.begin() + id * page_tokens;
        const bool same =
            std::equal(first, first + page_tokens, slots_before.begin() + id * page_tokens);
        CHECK(same == !(p.written_first <= page && page < p.written_last));
        if (shared || is_freed) CHECK(same);
      }
      CHECK(next == freed.size());
    }
    CHECK(batch.intact());
  });
  CHECK(moved > 20);
  CHECK(stayed > 100);
}

TEST_CASE("slots after a release are the ones in use", "[release]") {
  const auto slots = [](const kept_range& kept, shared_pages shared = nullptr) {
    return kept_slots(kept, plan_pages(kept, 4, shared), 4);
  };
  const std::uint8_t first_two = 3;
  CHECK(slots({2, 11, 21}) == kept_range{0, 1, 13});  // sinks move to 9, pages 0 and 1 go
  CHECK(slots({2, 11, 21}, &first_two) == kept_range{2, 7, 17});  // page 1 goes, sinks stay
  CHECK(slots({0, 11, 21}) == kept_range{0, 3, 13});
  CHECK(slots({5, 5, 21}) == kept_range{5, 5, 21});  // nothing goes
  CHECK(slots({0, 21, 21}) == kept_range{0, 0, 0});  // all goes
  CHECK(slots({2, 21, 21}) == kept_range{2, 4, 4});  // no suffix: the sinks' page is full
  CHECK(slots({2, 3, 3}) == kept_range{2, 3, 3});    // or as full as it was
  CHECK(slots({}) == kept_range{});
}

TEST_CASE("plans and tables that do not fit are refused", "[release]") {
  const auto exec = divided<1>();
  random_source random(base_seed());
  page_batch<std::int32_t> batch(random, 4, 3, 9, sharing::some);
  const auto kept = batch.kept.get();
  kept(0, 0) = {1, 20, 33};
  const auto plan = batch.plan();
  const auto plan_refused = [&](const view<const kept_range, 2>& ranges, index_t page_tokens,
                                const page_plans<>& to, const shared_pages_view<>& shared) {
    return plan_pages(exec, ranges, page_tokens, to, shared) == status::invalid_argument &&
           why_invalid(ranges, page_tokens, to, shared) != nullptr && batch.unwritten();
  };
  CHECK(plan_refused(kept, 0, plan, batch.shared));
  CHECK(plan_refused(kept, index_t{max_count} + 1, plan, batch.shared));
  CHECK(plan_refused({kept.data(), {3, 2}}, 4, plan, batch.shared));
  CHECK(plan_refused({kept.data(), {2, 1}}, 4, plan, batch.shared));
  CHECK(plan_refused(kept, 4, {{plan.plans.data(), {2}}, plan.compact_ranges, plan.mask_ranges},
                     batch.shared));
  CHECK(plan_refused(kept, 4, {plan.plans, {plan.compact_ranges.data(), {3, 2}}, plan.mask_ranges},
                     {}));
  CHECK(plan_refused(kept, 4, {plan.plans, plan.compact_ranges, {}}, {}));
  CHECK(plan_refused(kept, 4, plan, {batch.shared.data(), {3, 1}}));  // 33 tokens are 9 pages
  CHECK(plan_refused(kept, 4, plan, {batch.shared.data(), {2, 2}}));
  CHECK(plan_refused(kept, 4, plan, {batch.shared.data(), {3, 2}, {6, 3}}));
  kept(0, 0) = {21, 20, 33};
  CHECK(plan_refused(kept, 4, plan, batch.shared));
  kept(0, 0) = {1, 20, 33};
  CHECK(why_invalid(kept, 4, plan, batch.shared) == nullptr);
  CHECK(plan_pages(exec, kept, 4, plan, batch.shared) == status::ok);

  const auto table = batch.table(), freed = batch.freed();
  const auto ids = batch.ids;
  const auto release_refused =
      [&](const view<const page_plan, 1>& plans, const page_lists<std::int32_t>& from,
          const page_lists<std::int32_t>& to, const shared_pages_view<>& shared) {
        return release_pages(exec, plans, from, to, shared) == status::invalid_argument &&
               why_invalid(plans, from, to, shared) != nullptr && batch.ids == ids &&
               batch.freed_ids.unwritten();
      };
  const index_t width = batch.width;
  CHECK(release_refused({plan.plans.data(), {2}}, table, freed, batch.shared));
  CHECK(release_refused(plan.plans, {{table.ids.data(), {2, width}}, table.counts}, freed, {}));
  CHECK(release_refused(plan.plans, {table.ids, {table.counts.data(), {2}}}, freed, {}));
  CHECK(
      release_refused(plan.plans, {{table.ids.data(), {3, 5}, {10, 2}}, table.counts}, freed, {}));
  CHECK(release_refused(plan.plans, table, {{freed.ids.data(), {3, width - 1}}, freed.counts}, {}));
  CHECK(release_refused(plan.plans, table, {freed.ids, {}}, {}));
  CHECK(release_refused(plan.plans, table, freed, {batch.shared.data(), {3, 1}}));
  for (const page_plan wrong : {page_plan{-1, 2}, page_plan{2, 1}, page_plan{0, width}}) {
    const page_plan good = plan.plans(1);
    plan.plans(1) = wrong;
    CHECK(release_refused(plan.plans, table, freed, batch.shared));
    plan.plans(1) = good;
  }
  table.counts(2) += static_cast<position_t>(width);  // more than a row
  CHECK(release_refused(plan.plans, table, freed, batch.shared));
  table.counts(2) -= static_cast<position_t>(width);
  CHECK(why_invalid(plan.plans, table, freed, batch.shared) == nullptr);
  CHECK(release_pages(exec, plan.plans, table, freed, batch.shared) == status::ok);
}

TEST_CASE("no sequences are no work", "[release]") {
  CHECK(plan_pages(divided<1>(), {}, 16, {}) == status::invalid_argument);  // no group
  const view<const kept_range, 2> none(nullptr, {0, 1});
  const kept_ranges<> ranges(nullptr, {0, 1});
  CHECK(plan_pages(divided<1>(), none, 16, {{}, ranges, ranges}) == status::ok);
  CHECK(release_pages(divided<1>(), {}, page_lists<std::int64_t>{}, page_lists<std::int64_t>{}) ==
        status::ok);
}
