// SPDX-License-Identifier: Apache-2.0
// Lengths that an engine did not bring up to date, which nobody can look at before a kernel does.
#include "catch.hpp"
#include "emulated_backend.hpp"
#include "layouts.hpp"

using namespace refreekv;

/// A device whose memory nobody looks at.
struct unseen_backend : emulation::emulated_backend {};
template <>
struct refreekv::ops<unseen_backend>
    : refreekv::cuda_detail::device_ops<unseen_backend, device_memory> {};

namespace {

using device = device_memory;
constexpr index_t capacity = 40, heads = 2, dims = 8;
constexpr position_t stale[] = {std::numeric_limits<position_t>::min(), -1, 0, 40, 41,
                                std::numeric_limits<position_t>::max()};

position_t within(position_t length) {
  return std::clamp<position_t>(length, 0, static_cast<position_t>(capacity));
}

}  // namespace

TEST_CASE("no source has more tokens than its capacity", "[cuda]") {
  std::vector<float> memory(size(heads * capacity * dims));
  for (const position_t length : stale) {
    INFO("length " << length);
    const lengths_view<device> lengths(&length, {1});
    const view<float, 4, device> rows(memory.data(), {1, heads, capacity, dims});
    CHECK(dense(rows, lengths).tokens(0) == within(length));
    CHECK(observe_rows(rows, heads, lengths).tokens(0) ==
          std::clamp<index_t>(length, 0, rows.extent(3)));
    CHECK(int4_keys<device>{.codes = {nullptr, {1, heads, capacity, dims / 2}},
                            .ranges = {},
                            .dims = dims,
                            .lengths = lengths}
              .tokens(0) == within(length));
    const view<const int, 2, device> ids(nullptr, {1, capacity / 8});
    const paged<float, int, device> pages(
        view<float, 4, device>(memory.data(), {capacity / 8, heads, 8, dims}),
        page_table<int, device>::padded(ids, lengths));
    CHECK(pages.tokens(0) == within(length));
    const segment part{0, length};
    const segmented<float, device> segments(rows, {&part, {1, 1}});
    CHECK(segments.tokens(0) == within(length));
    const shard own(pages, view<const token_range, 2, device>{}, lengths, capacity);
    CHECK(own.tokens(0) == within(length));
  }
}

TEST_CASE("stale lengths write nothing outside of what a call was given", "[cuda]") {
  random_source random(base_seed());
  std::vector<float> memory(size(heads * capacity * dims)), queries(size(3 * 2 * heads * dims));
  for (float& x : memory) x = random.normal();
  for (float& x : queries) x = random.normal();
  static constexpr position_t untouched = -77;
  const unseen_backend exec;
  for (const position_t length : stale) {
    INFO("length " << length);
    const dense<float, device> source(
        view<float, 4, device>(memory.data(), {1, heads, capacity, dims}),
        lengths_view<device>(&length, {1}));
    const auto layer =
        observe(view<const float, 4, device>(queries.data(), {1, 3, 2 * heads, dims}), source,
                {.index = 9});
    const auto decide = [&](const auto& policy) {
      const std::size_t bytes = workspace_size(policy, exec, layer);
      std::vector<std::byte> scratch(bytes + 64, std::byte{0x5A});
      std::vector<position_t> positions(size(heads * capacity + 16), untouched);
      std::vector<kept_tokens> counts(size(heads));
      REQUIRE(select(policy, exec, layer,
                     kept_positions<device>{{positions.data(), {1, heads, capacity}},
                                            {counts.data(), {1, heads}}},
                     workspace<device>{scratch.data(), bytes}) == status::ok);
      CHECK(std::all_of(positions.end() - 16, positions.end(),
                        [](position_t x) { return x == untouched; }));
      CHECK(std::all_of(scratch.end() - 64, scratch.end(),
                        [](std::byte x) { return x == std::byte{0x5A}; }));
      for (const kept_tokens& k : counts) CHECK(k.tokens == within(length));
    };
    decide(policy::snapkv{.budget = 9, .window = 3});
    decide(policy::h2o{.budget = 9, .recent = 3, .window = 3});
    decide(policy::tova{.budget = 9});
    decide(policy::attention_ranked{.threshold = 0.1, .window = 3, .recent = 3});
    decide(policy::twilight{.mass = 0.8});

    {
      const policy::faithful policy{.tolerance = 0.4, .sinks = 1, .window = 3, .block = 8};
      std::vector<float> others = memory;
      const auto valued = with_values(
          layer,
          dense<float, device>(view<float, 4, device>(others.data(), {1, heads, capacity, dims}),
                               lengths_view<device>(&length, {1})));
      const index_t most = policy.most_stand_ins(capacity);
      const auto floats = size(heads * most * dims);
      std::vector<float> keys(floats + 16, -7.0f), values(floats + 16, -7.0f);
      std::vector<position_t> positions(size(heads * capacity)), rows(size(heads));
      std::vector<kept_tokens> counts(size(heads));
      std::vector<std::byte> scratch(workspace_size(policy, exec, valued));
      const kept_with_stand_ins<device> kept{
          {{positions.data(), {1, heads, capacity}}, {counts.data(), {1, heads}}},
          {{keys.data(), {1, heads, most, dims}},
           {values.data(), {1, heads, most, dims}},
           {rows.data(), {1, heads}}}};
      REQUIRE(select(policy, exec, valued, kept, {scratch.data(), scratch.size()}) == status::ok);
      for (const auto& written : {keys, values}) {
        CHECK(std::all_of(written.end() - 16, written.end(), [](float x) { return x == -7; }));
      }
      for (index_t h = 0; h < heads; ++h) {
        CHECK(counts[size(h)].tokens == within(length));
        CHECK(kept.length(0, h) <= within(length));
      }
    }
    const policy::refreekv policy{.window = 3};
    std::vector<std::byte> scratch(workspace_size(policy, exec, layer));
    kept_range kept{};
    REQUIRE(select(policy, exec, layer, {&kept, {1, 1}}, {scratch.data(), scratch.size()}) ==
            status::ok);
    CHECK(kept.tokens == within(length));
  }
}
