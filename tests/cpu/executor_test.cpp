// SPDX-License-Identifier: Apache-2.0
#include "refreekv/cpu/executor.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <set>
#include <vector>

#include "catch.hpp"
#include "ranks.hpp"

// The thread sanitizer does not follow a process with threads through fork.
#if defined(__SANITIZE_THREAD__)
#define REFREEKV_TEST_FORK 0
#elif defined(__has_feature)
#define REFREEKV_TEST_FORK !__has_feature(thread_sanitizer)
#else
#define REFREEKV_TEST_FORK 1
#endif
#if REFREEKV_TEST_FORK
#include <sys/wait.h>
#include <unistd.h>
#endif

using namespace refreekv;

namespace {

/// Whether each of three workers is called once in a run of any engine thread. Neither allocates
/// nor asserts: it is for threads and processes of all kinds.
bool calls_each_once(const thread_pool& pool) {
  std::array<std::atomic<int>, 3> calls{};
  pool.run([&](int w) { ++calls[static_cast<std::size_t>(w)]; });
  return std::all_of(calls.begin(), calls.end(), [](int count) { return count == 1; });
}

#if REFREEKV_TEST_FORK
/// Whether f says so in a child of this process, which is ended where it hangs.
template <class F>
bool succeeds_in_child(const F& f) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);
    _exit(f() ? 0 : 1);
  }
  int state = 0;
  return waitpid(child, &state, 0) == child && WIFEXITED(state) && WEXITSTATUS(state) == 0;
}
#endif

}  // namespace

TEST_CASE("a pool calls each worker once in every run, on a thread of its own", "[cpu][executor]") {
  for (const int threads : {-1, 1, 2, 5}) {
    thread_pool pool(threads);
    REQUIRE(pool.workers() == std::max(1, threads));
    std::vector<int> calls(static_cast<std::size_t>(pool.workers()));
    std::vector<std::thread::id> exec(calls.size());
    for (int round = 1; round <= 1000; ++round) {
      pool.run([&](int w) {
        ++calls[static_cast<std::size_t>(w)];
        exec[static_cast<std::size_t>(w)] = std::this_thread::get_id();
      });
      REQUIRE(calls == std::vector<int>(calls.size(), round));
      REQUIRE(std::set(exec.begin(), exec.end()).size() == exec.size());
    }
  }
}

TEST_CASE("a pool that was never used ends", "[cpu][executor]") { thread_pool pool(4); }

TEST_CASE("engine threads run on one pool at the same time", "[cpu][executor]") {
  const thread_pool pool(3);
  std::array<int, 2> wrong{};
  std::atomic<int> begun{0};
  run_ranks(2, [&](index_t engine) {
    for (int i = 1; i <= 3000; ++i) {
      for (++begun; begun < 2 * i;) std::this_thread::yield();  // both at once
      wrong[size(engine)] += !calls_each_once(pool);
    }
  });
  CHECK(wrong == std::array<int, 2>{});
}

TEST_CASE("what runs on a pool may run on it", "[cpu][executor]") {
  const thread_pool pool(3), other(2);
  for (int round = 0; round < 300; ++round) {
    std::array<std::array<int, 3>, 3> wrong{};
    std::atomic<int> deepest{0};
    pool.run([&](int a) {
      other.run([&](int) { deepest += calls_each_once(pool); });
      pool.run([&](int b) { wrong[size(a)][size(b)] += !calls_each_once(pool); });
    });
    REQUIRE(wrong == decltype(wrong){});
    REQUIRE(deepest == 3 * 2);
  }
}

TEST_CASE("engine threads that share a backend decide as each alone", "[cpu][executor]") {
  const cpu_backend<thread_pool> shared{3};
  const policy::refreekv policy{.threshold = 0.1};
  std::array<int, 2> wrong{};
  run_ranks(2, [&](index_t engine) {
    problem p(4, 2, 64, 1, {2000});
    random_source random(base_seed() + static_cast<unsigned>(engine));
    fill(p, random);
    const dense_cache<float> keys(p.keys);
    const auto layer = observe(p.query_view(), keys.source(), p.info());
    const auto decide = [&](const auto& exec) {
      return select_on_rank(policy, exec, layer, single_rank{});
    };
    const selection alone = decide(cpu_backend{});
    for (int i = 0; i < 100; ++i) {
      const selection s = decide(shared);
      wrong[size(engine)] += s.status != status::ok || s.kept != alone.kept;
    }
  });
  CHECK(wrong == std::array<int, 2>{});
}

#if REFREEKV_TEST_FORK
TEST_CASE("a forked process runs on its parent's pool and destroys its copy", "[cpu][executor]") {
  std::optional<thread_pool> pool(3);
  const auto runs = [&] { return calls_each_once(*pool) && calls_each_once(*pool); };
  const auto destroys = [&] {
    pool.reset();
    return true;
  };
  REQUIRE(succeeds_in_child(destroys));
  REQUIRE(succeeds_in_child(runs));
  REQUIRE(runs());
  REQUIRE(succeeds_in_child([&] { return runs() && succeeds_in_child(runs) && destroys(); }));
  REQUIRE(runs());
}

TEST_CASE("a process may be forked while another thread runs on a pool", "[cpu][executor]") {
  std::optional<thread_pool> pool(3);
  std::atomic<bool> forking{true};
  bool parent = true, children = true;
  run_ranks(2, [&](index_t engine) {
    while (engine == 1 && forking) parent = calls_each_once(*pool) && parent;
    for (int i = 0; engine == 0 && children && i < 20; ++i) {
      children = succeeds_in_child([&] {
        const bool runs = calls_each_once(*pool);
        pool.reset();
        return runs;
      });
    }
    if (engine == 0) forking = false;
  });
  CHECK(parent);
  CHECK(children);
}
#endif

TEST_CASE("items are visited once each, consecutive ones by one worker", "[cpu][executor]") {
  const thread_pool pool(3);
  for (const index_t items : {0, 1, 2, 3, 4, 100}) {
    for (const index_t elements : {0, 1 << 20}) {
      std::vector<int> worker_of(static_cast<std::size_t>(items), -1), visits(worker_of.size());
      for_each_item(pool, items, elements, [&](int w, index_t i) {
        visits[static_cast<std::size_t>(i)] += 1;
        worker_of[static_cast<std::size_t>(i)] = w;
      });
      CHECK(std::is_sorted(worker_of.begin(), worker_of.end()));
      CHECK(visits == std::vector<int>(visits.size(), 1));
      const bool shared = items > 1 && elements > 0;
      CHECK((items == 0 || worker_of.back() == 0) == !shared);
    }
  }
}

TEST_CASE("workers share items evenly", "[cpu][executor]") {
  const thread_pool pool(3);
  for (const index_t items : {0, 1, 2, 3, 100}) {
    std::vector<index_t> begins(3), ends(3);
    for_each_range(pool, items, [&](int w, index_t begin, index_t end) {
      begins[static_cast<std::size_t>(w)] = begin;
      ends[static_cast<std::size_t>(w)] = end;
    });
    index_t last = 0;
    for (std::size_t w = 0; w < 3; ++w) {
      const bool works = static_cast<index_t>(w) < std::min<index_t>(items, 3);
      CHECK((ends[w] > 0) == works);
      if (!works) continue;
      CHECK(begins[w] == last);
      CHECK(ends[w] > begins[w]);
      CHECK(ends[w] - begins[w] <= items / 3 + 1);
      last = ends[w];
    }
    CHECK(last == items);
    CHECK(workers_for(pool, items) == std::clamp<index_t>(items, 1, 3));
  }
}
