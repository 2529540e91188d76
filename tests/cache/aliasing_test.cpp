// SPDX-License-Identifier: Apache-2.0
// Memory that is named twice moves once, or the call is refused: all ways in which engines name it.
#include <utility>

#include "layouts.hpp"
#include "reference.hpp"
#include "selection.hpp"

using namespace refreekv;

namespace {

std::string words(const char* why) { return why == nullptr ? "" : why; }

/// Six slots 0 1 2 3 4 5 of which `kept` stay, in one compaction.
struct six_slots {
  std::vector<float> memory{0, 1, 2, 3, 4, 5};
  compaction mode;
  kept_range range{2, 3, 6};

  view<float, 4> rows(index_t sequences = 1, index_t heads = 1) {
    return {memory.data(), {sequences, heads, 6, 1}, {0, 0, 1, 1}};
  }

  /// Why compact refuses, and that nothing is written then.
  template <class... Sources>
  std::string refusal(view<const kept_range, 2> kept, const Sources&... sources) {
    const std::vector<float> before = memory;
    const std::string why = words(why_invalid(kept, mode, sources...));
    const status s = compact(divided<2>(), kept, mode, sources...);
    CHECK((s == status::ok) == why.empty());
    if (!why.empty()) CHECK(memory == before);
    return why;
  }
  template <class... Sources>
  std::string refusal_of_all(index_t sequences, const Sources&... sources) {
    const std::vector<kept_range> kept(size(sequences), range);
    return refusal({kept.data(), {sequences, 1}}, sources...);
  }
  std::vector<float> kept_rows() const {
    const auto first = memory.begin() + first_slot(range, mode);
    return {first, first + range.length()};
  }
};

template <class F>
void for_both_compactions(const F& f) {
  for (const compaction mode : {compaction::sinks_up, compaction::suffix_down}) {
    INFO((mode == compaction::sinks_up ? "sinks_up" : "suffix_down"));
    f(six_slots{.mode = mode});
  }
}

const std::vector<float> without_2{0, 1, 3, 4, 5};

}  // namespace

TEST_CASE("values that are the keys' memory are refused", "[aliasing]") {
  for_both_compactions([](six_slots slots) {
    CHECK(slots.refusal_of_all(1, dense(slots.rows()), dense(slots.rows())).find("two sources") ==
          0);
    CHECK(slots.refusal_of_all(1, dense(slots.rows())) == "");
    CHECK(slots.kept_rows() == without_2);
  });
}

TEST_CASE("heads, sequences and layers that are one cache are refused", "[aliasing]") {
  for_both_compactions([](six_slots slots) {
    const dense one(slots.rows());
    const dense other_heads(slots.rows(1, 3)), beams(slots.rows(3));
    const segment all[] = {{0, 6}, {0, 6}, {0, 6}};
    const segmented ring(slots.rows(3), view<const segment, 2>(all, {3, 1}));
    const dense<float> same[] = {one, one, one};
    const layered layers(view<const dense<float>, 1>(same, {3}), one);
    CHECK(slots.refusal_of_all(1, other_heads).find("KV heads share") == 0);
    CHECK(slots.refusal_of_all(3, beams).find("sequences share") == 0);
    CHECK(slots.refusal_of_all(3, ring).find("sequences share") == 0);
    CHECK(slots.refusal_of_all(3, layers).find("layers share") == 0);
    // All but one are left out.
    const kept_range all_but_last[] = {{2, 2, 6}, {2, 2, 6}, slots.range};
    CHECK(slots.refusal({all_but_last, {3, 1}}, beams) == "");
    CHECK(slots.kept_rows() == without_2);
    slots.memory = {0, 1, 2, 3, 4, 5};
    CHECK(slots.refusal({all_but_last, {3, 1}}, layers) == "");
    CHECK(slots.kept_rows() == without_2);
  });
}

TEST_CASE("positions of shared memory are refused as ranges are", "[aliasing]") {
  for_both_compactions([](six_slots slots) {
    std::vector<position_t> positions{1, 3, 4, 0, 0, 0, 1, 3, 4, 0, 0, 0};
    std::vector<kept_tokens> counts{{3, 6}, {3, 6}};
    const kept_positions<> one{{positions.data(), {1, 1, 6}}, {counts.data(), {1, 1}}};
    const kept_positions<> two{{positions.data(), {1, 2, 6}}, {counts.data(), {1, 2}}};
    const dense rows(slots.rows()), heads(slots.rows(1, 2));
    const auto refused = [&](const kept_positions<>& kept, const auto&... sources) {
      const std::string why = words(why_invalid(kept, slots.mode, sources...));
      CHECK((compact(divided<2>(), kept, slots.mode, sources...) == status::ok) == why.empty());
      return why;
    };
    CHECK(refused(one, rows, rows).find("two sources") == 0);
    CHECK(refused(two, heads).find("KV heads share") == 0);
    CHECK(slots.memory == std::vector<float>{0, 1, 2, 3, 4, 5});
    CHECK(refused(one, rows) == "");
    const auto first = slots.memory.begin() + first_slot(counts[0], slots.mode);
    CHECK(std::vector<float>(first, first + 3) == std::vector<float>{1, 3, 4});
  });
}

TEST_CASE("a page that is written is in the tables once", "[aliasing]") {
  // Pages of two slots. Ids as far apart as pools are large.
  const index_t pool_pages = 70000;
  std::vector<float> pool(size(2 * pool_pages));
  for (std::size_t i = 0; i < pool.size(); ++i) pool[i] = static_cast<float>(i);
  const auto refusal = [&](std::vector<std::int64_t> ids, std::vector<position_t> lengths,
                           std::vector<kept_range> kept, compaction mode) {
    const auto sequences = static_cast<index_t>(lengths.size());
    const paged keys(view(pool.data(), {pool_pages, 1, 2, 1}),
                     page_table<std::int64_t>::padded(
                         view<const std::int64_t, 2>(
                             ids.data(), {sequences, static_cast<index_t>(ids.size()) / sequences}),
                         {lengths.data(), {sequences}}));
    const std::vector<float> before = pool;
    const view<const kept_range, 2> ranges(kept.data(), {sequences, 1});
    const std::string why = words(why_invalid(ranges, mode, keys));
    CHECK((compact(divided<1>(), ranges, mode, keys) == status::ok) == why.empty());
    if (!why.empty()) CHECK(pool == before);
    std::copy(before.begin(), before.end(), pool.begin());
    return why.substr(0, why.find(" that"));
  };
  const auto up = compaction::sinks_up, down = compaction::suffix_down;
  const kept_range range{1, 4, 6};  // slot 0 moves to 3, or slots 4 and 5 to 1 and 2
  CHECK(refusal({7, 69999, 1}, {6}, {range}, up) == "");
  CHECK(refusal({7, 69999, 1}, {6}, {range}, down) == "");
  CHECK(refusal({0, 0, 1}, {6}, {range}, up) == "a page");
  CHECK(refusal({0, 0, 1}, {6}, {range}, down) == "a page");
  CHECK(refusal({69999, 1, 69999}, {6}, {range}, down) == "a page");  // written once, read again
  CHECK(refusal({69999, 1, 69999}, {6}, {range}, up) == "");          // not written
  CHECK(refusal({3, 40000, 5, 6, 40000, 8}, {6, 6}, {range, range}, up) == "a page");
  CHECK(refusal({3, 4, 5, 3, 40000, 8}, {6, 6}, {range, range}, up) == "");  // a prefix, unwritten
  CHECK(refusal({3, 4, 5, 3, 40000, 8}, {6, 6}, {range, range}, down) == "a page");
  CHECK(refusal({3, 4, 5, 3, 40000, 8}, {6, 6}, {range, {1, 1, 6}}, down) == "a page");
  CHECK(refusal({3, 4, 5, 9, 3, 8}, {6, 2}, {range, {1, 1, 2}}, down) == "");  // past its length
}

TEST_CASE("more pages than are sorted are told apart, too", "[aliasing]") {
  const index_t pool_pages = 600000;
  std::vector<float> pool(size(pool_pages));
  std::vector<std::int32_t> ids(3000);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(599999 - 199 * i);
  const position_t tokens = 3000;
  const kept_range range{4, 1500, tokens};
  const view<const kept_range, 2> kept(&range, {1, 1});
  const auto refused = [&] {
    const paged keys(view(pool.data(), {pool_pages, 1, 1, 1}),
                     page_table<std::int32_t>::padded(
                         view<const std::int32_t, 2>(ids.data(), {1, 3000}), {&tokens, {1}}));
    return why_invalid(kept, compaction::suffix_down, keys) != nullptr;
  };
  CHECK_FALSE(refused());
  for (const auto& [from, to] : {std::pair{100, 200}, {100, 2500}, {2500, 2600}, {0, 2}}) {
    const std::int32_t before = ids[size(to)];
    ids[size(to)] = ids[size(from)];
    CHECK(refused() == (from >= 4 && from < 1504));  // slots 4 to 1503 are written
    ids[size(to)] = before;
  }
}

TEST_CASE("prefixes and null blocks that nobody writes are no fault in any source", "[aliasing]") {
  std::vector<float> memory{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  const view<float, 4> cells(memory.data(), {2, 1, 12, 1}, {0, 0, 1, 1});
  const segment parts[] = {{0, 4}, {4, 4}, {0, 4}, {8, 4}};
  const segmented ring(cells, view<const segment, 2>(parts, {2, 2}));
  const kept_range both[] = {{1, 6, 8}, {1, 6, 8}};  // sinks go to slot 5: cells 5 and 9
  const view<const kept_range, 2> kept(both, {2, 1});
  REQUIRE(compact(divided<1>(), kept, compaction::sinks_up, ring) == status::ok);
  CHECK(memory == std::vector<float>{0, 1, 2, 3, 4, 0, 6, 7, 8, 0, 10, 11});
  CHECK(compact(divided<1>(), kept, compaction::suffix_down, ring) == status::invalid_argument);

  // Block 0 of one pool, in front of two layers, or of keys and values.
  const std::int32_t tables[2][3] = {{0, 1, 2}, {0, 3, 4}};
  const position_t length = 6;
  const auto source = [&](int i) {
    return paged(view(memory.data(), {6, 1, 2, 1}),
                 page_table<std::int32_t>::padded(view<const std::int32_t, 2>(tables[i], {1, 3}),
                                                  {&length, {1}}));
  };
  const paged<float> sources[] = {source(0), source(1)};
  const layered layers(view<const paged<float>, 1>(sources, {2}), sources[0]);
  const kept_range ranges[] = {{1, 4, 6}, {1, 4, 6}};
  const view<const kept_range, 2> of_one(ranges, {1, 1}), of_two(ranges, {2, 1});
  CHECK(why_invalid(of_two, compaction::sinks_up, layers) == nullptr);
  CHECK(why_invalid(of_one, compaction::sinks_up, sources[0], sources[1]) == nullptr);
}

TEST_CASE("null blocks behind a sliding window are no fault where nobody writes to them",
          "[aliasing]") {
  // As vLLM has them: what a window has left behind is block 0, again and again.
  const index_t page_tokens = 4, heads = 2, dim = 16;
  random_source random(base_seed());
  problem p(heads, 2, dim, 1, {39});
  fill(p, random);
  p.sliding_window = 22;
  const std::vector<std::int32_t> ids{0, 0, 0, 0, 5, 2, 7, 1, 3, 6};
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> pool(size(8 * heads * page_tokens * dim), nan);
  const paged keys(view(pool.data(), {8, heads, page_tokens, dim}),
                   page_table<std::int32_t>::padded(
                       view<const std::int32_t, 2>(ids.data(), {1, 10}), {p.lengths.data(), {1}}));
  for (index_t h = 0; h < heads; ++h) {
    for (index_t t = 16; t < 39; ++t) {
      std::memcpy(keys.run_at(0, h, t).data, &p.keys.at(0, h, t, 0), size(dim) * sizeof(float));
    }
  }
  const auto layer = observe(p.query_view(), keys, p.info());
  for (const count_t sinks : {0u, 4u}) {
    const policy::refreekv policy{.threshold = 0.2, .sinks = sinks};
    const selection s = run_select(policy, divided<2>(), layer);
    const auto rows = reference::attend(p, 0);
    CHECK(reference::disagreement(s.at(0), reference::decide(rows, 0, 4, policy), 0.2) == "");
    REQUIRE(s.at(0).cut > 17);
    REQUIRE(s.at(0).cut < 39);
    const view<const kept_range, 2> kept(s.kept.data(), {1, 1});
    CHECK(words(why_invalid(kept, compaction::suffix_down, keys)).find("a page") == 0);
    CHECK(compact(divided<2>(), kept, compaction::suffix_down, keys) == status::invalid_argument);
    CHECK(compact(divided<2>(), kept, compaction::sinks_up, keys) == status::ok);
    for (index_t h = 0; h < heads; ++h) {
      for (index_t t = s.at(0).cut; t < 39; ++t) {
        CHECK(*keys.run_at(0, h, t).data == p.keys.at(0, h, t, 0));
      }
    }
    // Whoever marks it as shared does not get it back.
    const std::uint8_t null_blocks[] = {0b00001111, 0};
    const page_plan plan = plan_pages(s.at(0), page_tokens, null_blocks);
    std::vector<std::int32_t> table = ids, freed(ids.size(), -1);
    const index_t count = remove_pages(plan, table.data(), 10, freed.data(), null_blocks);
    CHECK(count == plan.freed);
    CHECK(std::find(freed.begin(), freed.begin() + count, 0) == freed.begin() + count);
  }
}

TEST_CASE("what a host sees of device memory is refused", "[aliasing]") {
  float memory[24];
  const view<float, 4, device_memory> rows(memory, {1, 1, 6, 4}),
      part(memory, {1, 1, 6, 2}, {0, 0, 4, 1}), behind(memory + 2, {1, 1, 6, 2}, {0, 0, 4, 1}),
      expanded(memory, {1, 2, 6, 2}, {0, 0, 2, 1});
  const view<const kept_range, 2, device_memory> kept(nullptr, {1, 0});
  const auto why = [&](const auto&... sources) {
    return words(detail::aliased(kept, compaction::sinks_up, sources...));
  };
  CHECK(why(dense(rows)) == "");
  CHECK(why(dense(rows), dense(part)).find("two sources") == 0);
  CHECK(why(dense(part), dense(behind)) == "");
  CHECK(why(dense(expanded)).find("KV heads share") == 0);
}

TEST_CASE("rows overlap where they have a byte in common", "[aliasing]") {
  random_source random(base_seed());
  std::vector<std::uint8_t> memory(400);
  for (int round = 0; round < 20000; ++round) {
    const auto run = [&](auto* element) {
      using T = std::remove_pointer_t<decltype(element)>;
      const index_t stride = random.one_of<index_t>({1, 1, 2, 3, -1, 7});
      const index_t origin = 100 + random.between(0, 60);
      return token_run<T>{reinterpret_cast<T*>(memory.data() + origin * index_t{sizeof(T)}), 1, 0,
                          stride};
    };
    const auto a = run(static_cast<std::uint16_t*>(nullptr));
    auto b = run(static_cast<std::uint16_t*>(nullptr));
    const index_t a_dims = random.between(0, 8), b_dims = random.between(0, 8);
    const bool told = a_dims <= 1 || b_dims <= 1 || a.dim_stride == b.dim_stride;
    bool overlap = false;
    for (index_t i = 0; i < a_dims; ++i) {
      for (index_t k = 0; k < b_dims; ++k) {
        overlap = overlap || a.data + i * a.dim_stride == b.data + k * b.dim_stride;
      }
    }
    CAPTURE(a_dims, b_dims, a.dim_stride, b.dim_stride, b.data - a.data);
    const bool found = detail::rows_overlap(a, a_dims, b, b_dims);
    REQUIRE(found == (overlap && told));
  }
}
