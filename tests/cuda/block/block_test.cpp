// SPDX-License-Identifier: Apache-2.0
// The emulated block does what kernel bodies may ask of one, and reports what they may not do.
#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "catch.hpp"
#include "cuda/emulated_backend.hpp"

namespace {

using emulation::block;
using emulation::index_t;
using refreekv::cuda_detail::block_prefix_sum;
using refreekv::cuda_detail::block_reduce;
using refreekv::cuda_detail::block_suffix_sum;
using refreekv::cuda_detail::block_threads;
using refreekv::cuda_detail::larger;
using refreekv::cuda_detail::plus;
using refreekv::cuda_detail::vector16;
using refreekv::cuda_detail::warp_threads;
using refreekv::cuda_detail::warp_values;

struct nothing {};

/// A body that calls f(block, shared, item).
template <class Shared, class F>
struct body_of {
  using shared = Shared;
  F f;
  template <refreekv::cuda_detail::thread_block Block>
  void operator()(Block& b, shared& s, index_t item) const noexcept {
    f(b, s, item);
  }
};

template <class Shared = nothing, class F>
void run(const F& f, index_t items = 1, unsigned order_seed = 0) {
  const refreekv::status s =
      run_blocks(emulation::emulated_backend{order_seed}, items, body_of<Shared, F>{f});
  CHECK(s == refreekv::status::ok);
}

/// What the run is ended with.
template <class Shared = nothing, class F>
std::string error_of(const F& f, unsigned order_seed = 0) {
  try {
    run<Shared>(f, 1, order_seed);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

template <class T>
std::vector<T> random_values(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<T> values(count);
  for (T& v : values) v = static_cast<T>(static_cast<int>(random() % 2001) - 1000) / T{8};
  return values;
}

/// Neither commutative nor associative.
struct lopsided {
  float operator()(float a, float b) const { return a - 0.75f * b; }
};

/// The tree of shuffles across `lanes` lanes, from the farthest on, that ends at `lane`.
template <class T, class Op>
T tree(const std::vector<T>& of_lanes, int lane, int m, int lanes, Op op) {
  if (m == lanes) return of_lanes[static_cast<std::size_t>(lane)];
  return op(tree(of_lanes, lane, 2 * m, lanes, op), tree(of_lanes, lane ^ m, 2 * m, lanes, op));
}

template <int lanes, std::size_t values, class Op>
void check_tile(unsigned order_seed) {
  CAPTURE(lanes, values, order_seed);
  const auto x = random_values<float>(block_threads * values, order_seed + 1);
  std::vector<float> got(block_threads);
  std::vector<char> used_up(block_threads);
  run(
      [&](block& b, nothing&, index_t) {
        const auto rank = static_cast<std::size_t>(b.rank());
        float own[values];
        std::copy_n(x.data() + rank * values, values, own);
        got[rank] = b.template tile_reduce_scatter<lanes>(own, Op{});
        used_up[rank] = own[0] != x[rank * values];
      },
      1, order_seed);
  CHECK(std::count(used_up.begin(), used_up.end(), 1) == block_threads);
  for (std::size_t rank = 0; rank < block_threads; ++rank) {
    const std::size_t p = rank % lanes;
    std::vector<float> of_lanes;
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      of_lanes.push_back(x[(rank - p + lane) * values + p / (lanes / values)]);
    }
    CHECK(got[rank] == tree(of_lanes, static_cast<int>(p), 1, lanes, Op{}));
  }
}

}  // namespace

TEST_CASE("the emulated block is a thread block", "[cuda]") {
  STATIC_REQUIRE(refreekv::cuda_detail::thread_block<block>);
}

TEST_CASE("each thread of each item runs once, in the order that was asked for", "[cuda]") {
  constexpr index_t items = 5;
  const auto order_of = [](unsigned order_seed) {
    std::vector<index_t> order(items * block_threads, -1);
    unsigned next = 0;
    run(
        [&](block& b, nothing&, index_t item) {
          const unsigned at = __atomic_fetch_add(&next, 1u, __ATOMIC_RELAXED);
          order[at] = item * block_threads + b.rank();
        },
        items, order_seed);
    return order;
  };
  std::vector<index_t> in_order(items * block_threads);
  std::iota(in_order.begin(), in_order.end(), index_t{0});
  CHECK(order_of(0) == in_order);

  const std::vector<index_t> shuffled = order_of(1);
  CHECK(order_of(1) == shuffled);
  CHECK(order_of(2) != shuffled);
  std::vector<index_t> items_in_turn;
  std::vector<std::vector<index_t>> ranks_in_turn(items);
  for (std::size_t i = 0; i < shuffled.size(); ++i) {
    if (i % block_threads == 0) items_in_turn.push_back(shuffled[i] / block_threads);
    CHECK(shuffled[i] / block_threads == items_in_turn.back());
    ranks_in_turn[i / block_threads].push_back(shuffled[i] % block_threads);
  }
  CHECK_FALSE(std::is_sorted(items_in_turn.begin(), items_in_turn.end()));
  for (std::size_t i = 1; i < items; ++i) CHECK(ranks_in_turn[i] != ranks_in_turn[0]);
  CHECK(std::is_permutation(shuffled.begin(), shuffled.end(), in_order.begin()));

  CHECK_NOTHROW(run([](block&, nothing&, index_t) { std::abort(); }, 0));
}

TEST_CASE("shared memory starts as garbage", "[cuda]") {
  struct shared {
    unsigned char bytes[1000];
  };
  std::vector<std::ptrdiff_t> dirty(3);
  run<shared>(
      [&](block& b, shared& s, index_t item) {
        if (b.rank() != 0) return;
        dirty[static_cast<std::size_t>(item)] = std::count(s.bytes, s.bytes + 1000, 0xCD);
        s = {};
      },
      3);
  CHECK(dirty == std::vector<std::ptrdiff_t>{1000, 1000, 1000});
}

TEST_CASE("after sync() all see what any wrote", "[cuda]") {
  const unsigned order_seed = GENERATE(0u, 1u, 2u);
  struct shared {
    int written[block_threads];
  };
  std::vector<int> got(block_threads);
  run<shared>(
      [&](block& b, shared& s, index_t) {
        int sum = 0;
        for (int round = 0; round < 4; ++round) {
          s.written[b.rank()] = b.rank() * round;
          b.sync();
          sum += s.written[(b.rank() + 100) % block_threads];
          b.sync();
        }
        got[static_cast<std::size_t>(b.rank())] = sum;
      },
      1, order_seed);
  for (int r = 0; r < block_threads; ++r) {
    CHECK(got[static_cast<std::size_t>(r)] == (r + 100) % block_threads * 6);
  }
}

TEST_CASE("sync_and says whether b holds for all", "[cuda]") {
  const unsigned order_seed = GENERATE(0u, 1u, 2u);
  unsigned wrong = 0;
  run(
      [&](block& b, nothing&, index_t) {
        for (const int exception : {-1, 0, 77, -1, -1, 255, 31, -1}) {
          if (b.sync_and(b.rank() != exception) != (exception == -1)) b.add(wrong, 1u);
        }
      },
      1, order_seed);
  CHECK(wrong == 0);
}

TEST_CASE("tile_reduce_scatter adds up as shuffles do, bit for bit", "[cuda]") {
  const unsigned order_seed = GENERATE(0u, 1u);
  check_tile<1, 1, plus>(order_seed);
  check_tile<2, 2, lopsided>(order_seed);
  check_tile<8, 1, plus>(order_seed);
  check_tile<8, 4, lopsided>(order_seed);
  check_tile<16, 4, plus>(order_seed);
  check_tile<16, 16, lopsided>(order_seed);
  check_tile<32, 1, lopsided>(order_seed);
  check_tile<32, 8, plus>(order_seed);
  check_tile<32, 32, lopsided>(order_seed);
}

TEST_CASE("warps exchange values", "[cuda]") {
  const unsigned order_seed = GENERATE(0u, 1u, 2u);
  const auto x = random_values<double>(block_threads, order_seed + 1);  // their sums are exact
  struct results {
    double highest, sum, prefix, suffix, next;
  };
  std::vector<results> got(block_threads);
  run(
      [&](block& b, nothing&, index_t) {
        const double own = x[static_cast<std::size_t>(b.rank())];
        results& r = got[static_cast<std::size_t>(b.rank())];
        r.highest = b.warp_reduce(own, larger{});
        r.sum = b.warp_reduce(own, plus{});
        r.prefix = b.warp_prefix_sum(own);
        r.suffix = b.warp_suffix_sum(own);
        r.next = b.warp_broadcast(own, (b.rank() + 1) % warp_threads);
      },
      1, order_seed);
  for (std::size_t r = 0; r < block_threads; ++r) {
    CAPTURE(r);
    const auto first = x.begin() + static_cast<std::ptrdiff_t>(r / warp_threads * warp_threads);
    const auto lane = static_cast<std::ptrdiff_t>(r % warp_threads), last = lane + 1;
    CHECK(got[r].highest == *std::max_element(first, first + warp_threads));
    CHECK(got[r].sum == std::accumulate(first, first + warp_threads, 0.0));
    CHECK(got[r].prefix == std::accumulate(first, first + last, 0.0));
    CHECK(got[r].suffix == std::accumulate(first + lane, first + warp_threads, 0.0));
    CHECK(got[r].next == first[last % warp_threads]);
  }
}

TEST_CASE("blocks reduce and add up", "[cuda]") {
  const unsigned order_seed = GENERATE(0u, 1u, 2u);
  const auto x = random_values<double>(block_threads, order_seed + 5);
  struct results {
    double highest, sum, prefix, suffix, prefix_all, suffix_all;
  };
  std::vector<results> got(block_threads);
  using shared = warp_values<double>;
  run<shared>(
      [&](block& b, shared& s, index_t) {
        const double own = x[static_cast<std::size_t>(b.rank())];
        results& r = got[static_cast<std::size_t>(b.rank())];
        r.highest = block_reduce(b, s, own, larger{});
        r.sum = block_reduce(b, s, own, plus{});
        const auto prefix = block_prefix_sum(b, s, own);
        const auto suffix = block_suffix_sum(b, s, own);
        r.prefix = prefix.own;
        r.prefix_all = prefix.all;
        r.suffix = suffix.own;
        r.suffix_all = suffix.all;
      },
      1, order_seed);
  const double sum = std::accumulate(x.begin(), x.end(), 0.0);
  double before = 0;
  for (std::size_t r = 0; r < block_threads; ++r) {
    CAPTURE(r);
    CHECK(got[r].highest == *std::max_element(x.begin(), x.end()));
    CHECK(got[r].sum == sum);
    CHECK(got[r].prefix == before + x[r]);
    CHECK(got[r].prefix_all == sum);
    CHECK(got[r].suffix == sum - before);
    CHECK(got[r].suffix_all == sum);
    before += x[r];
  }
}

TEST_CASE("add loses nothing", "[cuda]") {
  struct shared {
    unsigned counter;
    std::uint64_t mass;
  };
  std::uint64_t counter = 0, mass = 0;
  run<shared>([&](block& b, shared& s, index_t) {
    if (b.rank() == 0) s = {};
    b.sync();
    b.add(s.counter, 1u);
    b.add(s.mass, std::uint64_t{1} << 40);
    b.sync();
    if (b.rank() == 9) {
      counter = s.counter;
      mass = s.mass;
    }
  });
  CHECK(counter == block_threads);
  CHECK(mass == std::uint64_t{block_threads} << 40);
}

TEST_CASE("asynchronous copies are there after the wait for them, not before", "[cuda]") {
  const unsigned order_seed = GENERATE(0u, 1u);
  struct shared {
    vector16 to[block_threads][4];
  };
  constexpr std::uint32_t lost = 0xCDCDCDCD;
  std::vector<vector16> from(block_threads * 4);
  for (std::size_t i = 0; i < from.size(); ++i) {
    for (std::uint32_t& w : from[i].words) w = static_cast<std::uint32_t>(i);
  }
  unsigned wrong = 0;
  run<shared>(
      [&](block& b, shared& s, index_t) {
        const std::size_t rank = static_cast<std::size_t>(b.rank());
        auto& to = s.to[rank];
        const auto expect = [&](std::initializer_list<bool> there) {
          std::uint32_t i = 0;
          for (const bool t : there) {
            const std::uint32_t want = t ? static_cast<std::uint32_t>(rank) * 4 + i : lost;
            if (to[i].words[0] != want || to[i].words[3] != want) b.add(wrong, 1u);
            ++i;
          }
        };
        for (vector16& v : to) v = {};
        b.template copy_async<16>(&to[0], &from[rank * 4]);
        b.template copy_async<16>(&to[1], &from[rank * 4 + 1]);
        b.commit();
        b.template copy_async<16>(&to[2], &from[rank * 4 + 2]);
        b.commit();
        expect({false, false, false});  // what was there is lost, too
        b.wait<2>();
        expect({false, false, false});
        b.template copy_async<16>(&to[3], &from[rank * 4 + 3]);  // in no group yet
        b.wait<1>();
        expect({true, true, false, false});
        b.commit();
        b.commit();
        b.wait<2>();
        expect({true, true, true, false});
        b.wait<0>();
        expect({true, true, true, true});
      },
      2, order_seed);
  CHECK(wrong == 0);
}

TEST_CASE("copies that a device refuses are reported", "[cuda]") {
  struct shared {
    alignas(16) std::byte bytes[64];
  };
  alignas(16) static const std::byte from[64]{};
  const auto error = [](std::ptrdiff_t to_byte, std::ptrdiff_t from_byte) {
    return error_of<shared>([=](block& b, shared& s, index_t) {
      std::byte* const to = s.bytes;
      if (b.rank() == 3) b.template copy_async<16>(to + to_byte, from + from_byte);
      b.sync();
    });
  };
  CHECK(error(16, 32) == "");
  CHECK(error(48, 48) == "");
  CHECK(error(4, 0) == "copy_async between unaligned addresses, thread 3, item 0");
  CHECK(error(0, 8) == "copy_async between unaligned addresses, thread 3, item 0");
  CHECK(error(64, 0) == "copy_async to an address outside shared memory, thread 3, item 0");
  CHECK(error(-16, 0) == "copy_async to an address outside shared memory, thread 3, item 0");
}

TEST_CASE("threads that wait in vain are counted", "[cuda]") {
  const unsigned order_seed = GENERATE(0u, 1u);
  const auto stuck = [&](auto f) {
    return error_of([f](block& b, nothing&, index_t) { f(b); }, order_seed);
  };
  CHECK(stuck([](block& b) {
          if (b.rank() != 7) b.sync();
        }) == "255 threads stuck, item 0");
  CHECK(stuck([](block& b) {
          if (b.rank() == 7) b.sync();
        }) == "1 threads stuck, item 0");
  CHECK(stuck([](block& b) {
          if (b.rank() % 2 == 0) {
            b.sync();
          } else {
            (void)b.sync_and(true);
          }
        }) == "256 threads stuck, item 0");
  CHECK(stuck([](block& b) {
          if (b.rank() != 64) (void)b.warp_reduce(1, plus{});
        }) == "31 threads stuck, item 0");
  CHECK(stuck([](block& b) {
          if (b.rank() == 64) {
            (void)b.warp_reduce(1, plus{});
          } else {
            (void)b.warp_reduce(1, larger{});
          }
        }) == "32 threads stuck, item 0");
  CHECK(stuck([](block& b) {
          if (b.rank() == 64) b.sync();
          (void)b.warp_prefix_sum(1.0f);
          if (b.rank() != 64) b.sync();
        }) == "256 threads stuck, item 0");
  CHECK(stuck([](block& b) { (void)b.warp_broadcast(1, b.rank() == 200 ? 32 : 0); }) ==
        "warp_broadcast of no lane of the warp, thread 200, item 0");
  // The engine starts over.
  CHECK(stuck([](block& b) {
          b.sync();
          (void)b.warp_reduce(1, plus{});
          b.sync();
        }) == "");
}

#if !EMULATION_TSAN  // to which it is a race: see races.cpp
TEST_CASE("a missing sync() shows with any order", "[cuda]") {
  const unsigned order_seed = GENERATE(0u, 1u, 2u);
  struct shared {
    int written[block_threads];
  };
  unsigned wrong = 0;
  run<shared>(
      [&](block& b, shared& s, index_t) {
        s.written[b.rank()] = 1;
        if (s.written[(b.rank() + 1) % block_threads] != 1) b.add(wrong, 1u);
      },
      1, order_seed);
  CHECK(wrong > 0);
}
#endif

TEST_CASE("for_each_body covers each index once", "[cuda]") {
  const index_t count = GENERATE(0, 1, 255, 256, 257, 1000);
  const unsigned order_seed = GENERATE(0u, 1u);
  std::vector<int> calls(static_cast<std::size_t>(count) + 1);
  auto f = [&](index_t i) { ++calls[static_cast<std::size_t>(i)]; };
  CHECK(run_blocks(
            emulation::emulated_backend{order_seed}, refreekv::cuda_detail::blocks_for(count),
            refreekv::cuda_detail::for_each_body<decltype(f)>{count, f}) == refreekv::status::ok);
  std::vector<int> once(calls.size(), 1);
  once.back() = 0;
  CHECK(calls == once);
}

TEST_CASE("segments are sorted up to their lengths, and equals keep their order", "[cuda]") {
  using refreekv::cuda_detail::key_segments;
  constexpr index_t capacity = 4;
  const std::vector<index_t> lengths{3, 0, 2};
  for (const unsigned seed : {0u, 1u}) {  // segment by segment, and together
    const emulation::emulated_backend exec{seed};
    const key_segments segments = key_segments::of(exec, 3, capacity);
    REQUIRE(segments.together == (seed == 1));
    // Scores of tokens from the last one back, as they are ranked, and slots that nobody has.
    const std::vector<std::uint32_t> scores{7, 5, 7, key_segments::no_score,
                                            1, 1, 1, key_segments::no_score,
                                            9, 2, 1, key_segments::no_score};
    std::vector<std::uint64_t> keys, spare(scores.size(), 77);
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const auto segment = static_cast<index_t>(i) / capacity,
                 slot = static_cast<index_t>(i) % capacity;
      const bool is_there = slot < lengths[static_cast<std::size_t>(segment)];
      keys.push_back(
          segments.key(segment, is_there ? scores[i] : key_segments::no_score,
                       is_there ? lengths[static_cast<std::size_t>(segment)] - 1 - slot : 0));
      CHECK(segments.score_of(keys.back()) == (is_there ? scores[i] : key_segments::no_score));
    }
    std::vector<std::byte> temporary(sort_bytes(exec, segments));
    REQUIRE(!temporary.empty());
    std::uint64_t *sorted = keys.data(), *other = spare.data();
    REQUIRE(sort_segments(exec, segments, sorted, other, lengths.data(), temporary.data(),
                          temporary.size()) == refreekv::status::ok);
    CHECK(sorted != other);
    const auto tokens_of = [&](index_t segment, index_t count) {
      std::vector<refreekv::position_t> tokens;
      for (index_t i = 0; i < count; ++i) {
        tokens.push_back(segments.token_of(sorted[segment * capacity + i]));
      }
      return tokens;
    };
    CHECK(tokens_of(0, 3) == std::vector<refreekv::position_t>{1, 2, 0});
    CHECK(tokens_of(2, 2) == std::vector<refreekv::position_t>{0, 1});
    CHECK(sort_segments(exec, segments, sorted, other, lengths.data(), nullptr, 0) ==
          refreekv::status::device_error);
  }
}
