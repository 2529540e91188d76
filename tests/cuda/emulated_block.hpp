// SPDX-License-Identifier: Apache-2.0
// Runs blocks of kernel bodies on the CPU, a fiber per thread, and finds errors that a GPU does not
// report.
//
// Each of these errors ends a run or shows in its result, in every build:
// - a deadlock, or threads of a warp that make different calls;
// - a read of unwritten shared memory, because it starts as garbage;
// - an asynchronous copy without a wait, because its destination is garbage from the call to the
//   wait; also one that is not aligned or not to shared memory;
// - a missing sync(), at least with some order of the threads.
// ThreadSanitizer reports a missing sync() as a race in any order. It also reports a race if a
// block accesses memory that an earlier block wrote, or writes memory that an earlier block read.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.hpp"
#include "refreekv/cuda/block/block.hpp"

namespace emulation {

using refreekv::index_t;
using refreekv::cuda_detail::block_threads;
using refreekv::cuda_detail::block_warps;
using refreekv::cuda_detail::vector16;
using refreekv::cuda_detail::warp_threads;

inline constexpr int garbage = 0xCD;

/// Where threads that make the same call wait for each other.
struct meeting {
  const void* call;
  int arrived = 0;
  fiber* waiting[block_threads];
};

/// A cooperative scheduler: one fiber runs until it waits or ends, then the one woken last.
class scheduler {
 public:
  /// Runs all woken fibers, and those that they wake, until no fiber can run.
  void run() noexcept {
    running_ = &host_;
    wait();
  }

  /// Makes a fiber ready. It runs before fibers that were woken earlier.
  void wake(fiber& f) noexcept { ready_[ready_count_++] = &f; }

  /// Suspends the calling fiber until another one wakes it.
  void wait() noexcept {
    fiber& self = *running_;
    fiber& next = ready_count_ > 0 ? *ready_[--ready_count_] : host_;
    running_ = &next;
    self.switch_to(next);
  }

  /// Returns when `threads` fibers have arrived with the same `call`; the last one calls conclude()
  /// first. A fiber that arrives with another `call` than the first one waits for ever.
  template <class Conclude>
  void meet(meeting& at, int threads, const void* call, Conclude conclude) noexcept {
    if (at.arrived == 0) at.call = call;
    if (at.call != call) {
      wait();
    } else if (at.arrived < threads - 1) {
      at.waiting[at.arrived++] = running_;
      wait();
    } else {
      conclude();
      while (at.arrived > 0) wake(*at.waiting[--at.arrived]);
    }
  }

  /// Suspends all fibers for good, so that run() returns.
  void stop() noexcept {
    ready_count_ = 0;
    wait();
  }

 private:
  fiber host_;
  fiber* running_ = nullptr;
  fiber* ready_[block_threads];
  int ready_count_ = 0;
};

/// The values that the lanes of a warp exchange.
struct warp {
  meeting lanes;
  std::byte given[warp_threads * warp_threads * sizeof(std::uint64_t)];
  std::byte taken[warp_threads * sizeof(std::uint64_t)];
};

/// The state that the threads of a block have in common, besides the body's `shared`.
struct block_state {
  scheduler threads;
  meeting barrier;
  bool all_so_far = true, all = true;
  char fences[2];
  warp warps[block_warps];
  const std::byte* shared_begin = nullptr;
  const std::byte* shared_end = nullptr;
  const char* error = nullptr;
  int error_rank = 0;
};

/// A thread's view of its block: a thread_block.
class block {
 public:
  block(block_state& state, int rank) noexcept : state_(&state), rank_(rank) {}

  /// Resets the thread for the next block.
  void restart() noexcept {
    phase_ = 0;
    copies_.clear();
    groups_.clear();
    grouped_ = 0;
  }

  [[nodiscard]] int rank() const noexcept { return rank_; }

  void sync() noexcept {
    static constexpr char call = 0;
    barrier(&call, true);
  }
  [[nodiscard]] bool sync_and(bool b) noexcept {
    static constexpr char call = 0;
    return barrier(&call, b);
  }

  template <int bytes>
  void copy_async(void* to, const void* from) noexcept {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16);
    const auto* first = static_cast<const std::byte*>(to);
    const auto misaligned = [](const void* p) {
      return reinterpret_cast<std::uintptr_t>(p) % bytes != 0;
    };
    if (misaligned(to) || misaligned(from)) fail("copy_async between unaligned addresses");
    if (first < state_->shared_begin || state_->shared_end - first < bytes) {
      fail("copy_async to an address outside shared memory");
    }
    std::memset(to, garbage, bytes);
    copies_.push_back({to, from, bytes});
  }
  void commit() noexcept {
    groups_.push_back(copies_.size() - grouped_);
    grouped_ = copies_.size();
  }
  template <int n>
  void wait() noexcept {
    static_assert(n >= 0);
    if (groups_.size() <= n) return;
    const auto end = groups_.end() - n;
    const auto count =
        static_cast<std::ptrdiff_t>(std::accumulate(groups_.begin(), end, std::size_t{0}));
    for (auto c = copies_.begin(); c != copies_.begin() + count; ++c) {
      std::memcpy(c->to, c->from, c->bytes);
    }
    copies_.erase(copies_.begin(), copies_.begin() + count);
    groups_.erase(groups_.begin(), end);
    grouped_ -= static_cast<std::size_t>(count);
  }

  template <int lanes, class T, std::size_t N, class Op>
  [[nodiscard]] T tile_reduce_scatter(T (&x)[N], Op op) noexcept {
    static_assert(std::has_single_bit(unsigned{lanes}) && std::has_single_bit(N) &&
                  N <= unsigned{lanes} && lanes <= warp_threads);
    const T own = exchange<T>(x, [op](T(&all)[warp_threads][N], T(&result)[warp_threads]) {
      // In the order of shuffles on a device: each lane keeps one half of its values and sends the
      // other half. With one value left, it keeps and sends that one.
      std::size_t n = N;
      for (int m = lanes / 2; m > 0; m /= 2) {
        const std::size_t kept = n > 1 ? n / 2 : 1;
        T next[warp_threads][N];
        for (int lane = 0; lane < warp_threads; ++lane) {
          const std::size_t from = n > 1 && (lane & m) != 0 ? kept : 0;
          for (std::size_t i = 0; i < kept; ++i) {
            next[lane][i] = op(all[lane][from + i], all[lane ^ m][from + i]);
          }
        }
        for (int lane = 0; lane < warp_threads; ++lane) {
          for (std::size_t i = 0; i < kept; ++i) all[lane][i] = next[lane][i];
        }
        n = kept;
      }
      for (int lane = 0; lane < warp_threads; ++lane) result[lane] = all[lane][0];
    });
    std::memset(x, garbage, sizeof x);
    return own;
  }

  template <class T, class Op>
  [[nodiscard]] T warp_reduce(T x, Op op) noexcept {
    T values[] = {x};
    return tile_reduce_scatter<warp_threads>(values, op);
  }

  template <class T>
  [[nodiscard]] T warp_prefix_sum(T x) noexcept {
    return exchange<T>(x, [](const T(&all)[warp_threads], T(&sums)[warp_threads]) {
      std::copy(all, all + warp_threads, sums);
      for (int d = 1; d < warp_threads; d *= 2) {
        for (int lane = warp_threads - 1; lane >= d; --lane) {
          sums[lane] = sums[lane - d] + sums[lane];
        }
      }
    });
  }
  template <class T>
  [[nodiscard]] T warp_suffix_sum(T x) noexcept {
    return exchange<T>(x, [](const T(&all)[warp_threads], T(&sums)[warp_threads]) {
      std::copy(all, all + warp_threads, sums);
      for (int d = 1; d < warp_threads; d *= 2) {
        for (int lane = 0; lane + d < warp_threads; ++lane) {
          sums[lane] = sums[lane] + sums[lane + d];
        }
      }
    });
  }

  template <class T>
  [[nodiscard]] T warp_broadcast(T x, int lane) noexcept {
    struct offer {
      T value;
      int wanted;
    };
    if (lane < 0 || lane >= warp_threads) fail("warp_broadcast of no lane of the warp");
    const auto look_up = [](const offer(&all)[warp_threads], T(&values)[warp_threads]) {
      for (int l = 0; l < warp_threads; ++l) values[l] = all[all[l].wanted].value;
    };
    return exchange<T>(offer{x, lane}, look_up);
  }

  void add(unsigned& to, unsigned x) noexcept { __atomic_fetch_add(&to, x, __ATOMIC_RELAXED); }
  void add(std::uint64_t& to, std::uint64_t x) noexcept {
    __atomic_fetch_add(&to, x, __ATOMIC_RELAXED);
  }

 private:
  struct copy {
    void* to;
    const void* from;
    std::size_t bytes;
  };

  /// Ends the run with an error. The engine throws it later, because a body is noexcept.
  void fail(const char* error) noexcept {
    const race_detector::unobserved of_the_engine;
    state_->error = error;
    state_->error_rank = rank_;
    state_->threads.stop();
  }

  bool barrier(const void* call, bool b) noexcept {
    // Barriers alternate between two fences. With a single fence, a thread that reaches the next
    // barrier early would release it before a late thread acquires it for this barrier. This would
    // order the early thread's accesses before the late thread's, and hide races.
    char* const fence = &state_->fences[phase_];
    phase_ ^= 1;
    race_detector::release(fence);
    const bool all = [&] {
      const race_detector::unobserved of_the_engine;
      block_state& s = *state_;
      s.all_so_far = s.all_so_far && b;
      s.threads.meet(s.barrier, block_threads, call, [&] {
        s.all = s.all_so_far;
        s.all_so_far = true;
      });
      return s.all;
    }();
    race_detector::acquire(fence);
    return all;
  }

  /// Exchanges values in a warp: each lane passes `mine`, and resolve(values of all lanes, results)
  /// computes each lane's result. Does not order memory.
  template <class Result, class Given, class Resolve>
  Result exchange(const Given& mine, Resolve resolve) noexcept {
    static constexpr char call = 0;  // unique, as Resolve has another type in each call
    static_assert(std::is_arithmetic_v<Result> && sizeof(Result) >= 4, "what CUDA can shuffle");
    static_assert(sizeof(Given) * warp_threads <= sizeof(warp::given));
    static_assert(sizeof(Result) * warp_threads <= sizeof(warp::taken));
    const race_detector::unobserved of_the_engine;
    warp& w = state_->warps[rank_ / warp_threads];
    const std::size_t lane = static_cast<std::size_t>(rank_ % warp_threads);
    std::memcpy(w.given + lane * sizeof mine, &mine, sizeof mine);
    state_->threads.meet(w.lanes, warp_threads, &call, [&] {
      Given all[warp_threads];
      std::memcpy(all, w.given, sizeof all);
      Result results[warp_threads];
      resolve(all, results);
      std::memcpy(w.taken, results, sizeof results);
    });
    Result own;
    std::memcpy(&own, w.taken + lane * sizeof own, sizeof own);
    return own;
  }

  block_state* state_;
  int rank_;
  int phase_ = 0;
  std::vector<copy> copies_;
  std::vector<std::size_t> groups_;  // number of copies in each group
  std::size_t grouped_ = 0;          // number of copies in any group
};

/// A body and the arguments of one block's call.
struct job {
  const void* body;
  void (*call)(const job&, block&);
  void* shared;
  std::size_t shared_bytes;
  index_t item;
};

/// The threads of a block. They keep their stacks from one block to the next.
class crew {
 public:
  /// To ThreadSanitizer, threads whose ranks are equal modulo `actors` are one thread.
  explicit crew(int actors) : actors_(static_cast<std::size_t>(actors)) {
    void* const memory = mmap(nullptr, block_threads * stride, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks_ = static_cast<std::byte*>(memory);
    std::byte* stack = stacks_;
    for (int rank = 0; rank < block_threads; ++rank, stack += stride) {
      mprotect(stack, guard, PROT_NONE);  // a stack overflow faults
      // Staggered starts, because equal offsets in the pages would collide in the same cache sets.
      const std::size_t apart = static_cast<std::size_t>(rank) % 61 * 256;
      const auto& as = actors_[static_cast<std::size_t>(rank % actors)];
      workers_.emplace_back(*this, rank, as, stack + guard, stride - guard - apart);
    }
  }
  ~crew() {
    workers_.clear();
    munmap(stacks_, block_threads * stride);
  }
  crew(const crew&) = delete;
  crew& operator=(const crew&) = delete;

  /// Runs a block; its threads start in the order of `ranks`. Returns an error message, or an empty
  /// string. After an error the crew can only be destroyed.
  [[nodiscard]] std::string run(const job& j, const std::vector<int>& ranks) {
    job_ = &j;
    state_.shared_begin = static_cast<const std::byte*>(j.shared);
    state_.shared_end = state_.shared_begin + j.shared_bytes;
    running_ = block_threads;
    for (auto rank = ranks.rbegin(); rank != ranks.rend(); ++rank) {
      state_.threads.wake(workers_[static_cast<std::size_t>(*rank)].own);
    }
    race_detector::release(&start_);
    state_.threads.run();
    if (state_.error != nullptr) {
      return state_.error + (", thread " + std::to_string(state_.error_rank));
    }
    return running_ == 0 ? "" : std::to_string(running_) + " threads stuck";
  }

  /// Orders the blocks that the crew ran before everything that follows.
  void join() noexcept { race_detector::acquire(&end_); }

 private:
  static constexpr std::size_t guard = 4096;
  static constexpr std::size_t stride = std::size_t{256} << 10;  // large, as sanitizers' frames are

  struct worker {
    worker(crew& all, int rank, const race_detector::actor& as, std::byte* stack, std::size_t bytes)
        : thread(all.state_, rank), of(all), own(as, stack, bytes, live, this) {}

    /// The fiber of a worker: each iteration runs its thread of one block.
    [[noreturn]] static void live(void* self) noexcept {
      auto& [thread, of, own] = *static_cast<worker*>(self);
      for (;;) {
        race_detector::look_again();
        race_detector::acquire(&of.start_);
        thread.restart();
        of.job_->call(*of.job_, thread);
        race_detector::release(&of.end_);
        race_detector::look_away();
        --of.running_;
        of.state_.threads.wait();
      }
    }

    block thread;
    crew& of;
    fiber own;
  };

  block_state state_;
  const job* job_ = nullptr;
  int running_ = 0;
  char start_ = 0, end_ = 0;  // fences
  std::byte* stacks_ = nullptr;
  std::vector<race_detector::actor> actors_;
  std::deque<worker> workers_;
};

/// Runs bodies, one block after another.
class engine {
 public:
  engine() = default;
  ~engine() {
    const race_detector::unobserved of_the_engine;
    for (auto& c : crews_) c.reset();
  }
  engine(const engine&) = delete;
  engine& operator=(const engine&) = delete;

  /// Runs the body for each item in [0, items). With order_seed 0, items and threads run in order.
  /// Otherwise the seed shuffles the items, and the threads anew for each block. Throws
  /// std::logic_error if the body breaks a rule of blocks; what it wrote is then undefined.
  template <refreekv::cuda_detail::kernel_body Body>
  void run(const Body& body, index_t items, unsigned order_seed = 0) {
    using shared = typename Body::shared;
    static_assert(sizeof(shared) <= 48 * 1024, "more than a CUDA block has without asking");
    static_assert(sizeof(Body) <= 4096, "more than a CUDA kernel takes as arguments");
    static_assert(std::is_trivially_default_constructible_v<shared> &&
                  std::is_trivially_destructible_v<shared>);
    const auto call = [](const job& j, block& thread) {
      (*static_cast<const Body*>(j.body))(thread, *static_cast<shared*>(j.shared), j.item);
    };
    const race_detector::unobserved of_the_engine;
    std::mt19937 random(order_seed);
    std::vector<index_t> order(static_cast<std::size_t>(items));
    std::iota(order.begin(), order.end(), index_t{0});
    if (order_seed != 0) std::shuffle(order.begin(), order.end(), random);
    std::vector<int> ranks(block_threads);
    std::iota(ranks.begin(), ranks.end(), 0);
    for (const index_t item : order) {
      if (order_seed != 0) std::shuffle(ranks.begin(), ranks.end(), random);
      // New memory for each block: ThreadSanitizer would report races of blocks that reuse it.
      const auto s = std::make_unique_for_overwrite<shared>();
      std::memset(static_cast<void*>(s.get()), garbage, sizeof(shared));
      run_block({&body, call, s.get(), sizeof(shared), item}, ranks);
    }
    join();
  }

 private:
  void run_block(const job& j, const std::vector<int>& ranks) {
    const int turn = std::popcount(blocks_++) % crews;
    std::unique_ptr<crew>& next = crews_[turn];
    if (next == nullptr) next = std::make_unique<crew>(121 - turn);
    const std::string error = next->run(j, ranks);
    if (error.empty()) return;
    next.reset();
    join();
    throw std::logic_error(error + ", item " + std::to_string(j.item));
  }

  void join() noexcept {
    for (auto& c : crews_) {
      if (c != nullptr) c->join();
    }
  }

  // To ThreadSanitizer, barriers order all accesses of one crew, but not those of two crews. Crews
  // alternate so that, for any distance between blocks, some pair runs on different crews.
  // Together the crews use fewer than ThreadSanitizer's 255 actors, which leaves some to others.
  // Threads that share an actor in one crew do not in the other.
  static constexpr int crews = EMULATION_TSAN ? 2 : 1;
  std::unique_ptr<crew> crews_[crews];
  unsigned blocks_ = 0;
};

}  // namespace emulation
