// SPDX-License-Identifier: Apache-2.0
// Blocks of kernel bodies on the CPU: a fiber per thread, and errors that a GPU keeps quiet about.
//
// Each of these ends a run or shows in its result, in every build:
// - threads that wait for others that do not come, and threads of a warp that make different calls;
// - reads of shared memory that nothing was written to: it starts as garbage;
// - asynchronous copies that nobody waited for, that are not aligned, or that are not to shared
//   memory: their destination is garbage from the call to the wait that they must be done by;
// - a missing sync(), at least with some order of the threads.
// Under ThreadSanitizer a missing sync() is a race in any order, and so is what one block does to
// memory that the block before it wrote, or read, too.
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

/// Takes turns: one fiber runs until it waits or ends, then the one that was woken last.
class scheduler {
 public:
  /// Runs what was woken, and what it wakes, until nothing can run.
  void run() noexcept {
    running_ = &host_;
    wait();
  }

  /// To be run before those that were woken earlier.
  void wake(fiber& f) noexcept { ready_[ready_count_++] = &f; }

  /// Lets others run until somebody wakes the calling fiber.
  void wait() noexcept {
    fiber& self = *running_;
    fiber& next = ready_count_ > 0 ? *ready_[--ready_count_] : host_;
    running_ = &next;
    self.switch_to(next);
  }

  /// Returns when `threads` fibers have called it for the same call; the last of them calls
  /// conclude() first. Who makes another call than the first to come waits for ever.
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

  /// Leaves everything as it is.
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

/// What the lanes of a warp give each other.
struct warp {
  meeting lanes;
  std::byte given[warp_threads * warp_threads * sizeof(std::uint64_t)];
  std::byte taken[warp_threads * sizeof(std::uint64_t)];
};

/// What the threads of a block have in common besides their `shared`.
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

  /// For the next block.
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
      // As shuffles do it: each lane keeps one half of its values and gives the other, then, with
      // one value left, keeps and gives that.
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

  /// Ends the run. A body is noexcept, so the engine throws.
  void fail(const char* error) noexcept {
    const race_detector::unobserved of_the_engine;
    state_->error = error;
    state_->error_rank = rank_;
    state_->threads.stop();
  }

  bool barrier(const void* call, bool b) noexcept {
    // Two fences by turns: with one, a thread that is early at the next barrier would order what
    // it did since this one before a thread that is late to leave it.
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

  /// The warp's lanes give `mine`; resolve(all that was given, results) says what each one gets.
  /// It orders no memory.
  template <class Result, class Given, class Resolve>
  Result exchange(const Given& mine, Resolve resolve) noexcept {
    static constexpr char call = 0;  // Resolve has another type for every kind of call
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
  std::vector<std::size_t> groups_;  // copies of each
  std::size_t grouped_ = 0;          // copies that are in a group
};

/// A body, and what a block calls it with.
struct job {
  const void* body;
  void (*call)(const job&, block&);
  void* shared;
  std::size_t shared_bytes;
  index_t item;
};

/// The threads of a block, on stacks that they keep for the next one.
class crew {
 public:
  /// For TSan, threads whose ranks are equal modulo `actors` are the same.
  explicit crew(int actors) : actors_(static_cast<std::size_t>(actors)) {
    void* const memory = mmap(nullptr, block_threads * stride, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks_ = static_cast<std::byte*>(memory);
    std::byte* stack = stacks_;
    for (int rank = 0; rank < block_threads; ++rank, stack += stride) {
      mprotect(stack, guard, PROT_NONE);  // an overflow shows
      // Stacks that start alike in their pages would keep each other out of the cache.
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

  /// Runs a block; its threads start in the order of `ranks`. Returns what went wrong, if anything.
  /// The crew can only be destroyed then.
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

  /// Orders the blocks that it ran before what comes next.
  void join() noexcept { race_detector::acquire(&end_); }

 private:
  static constexpr std::size_t guard = 4096;
  static constexpr std::size_t stride = std::size_t{256} << 10;  // sanitizers' frames are large

  struct worker {
    worker(crew& all, int rank, const race_detector::actor& as, std::byte* stack, std::size_t bytes)
        : thread(all.state_, rank), of(all), own(as, stack, bytes, live, this) {}

    /// Of a worker: a block in each round.
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

/// Runs bodies, block after block.
class engine {
 public:
  engine() = default;
  ~engine() {
    const race_detector::unobserved of_the_engine;
    for (auto& c : crews_) c.reset();
  }
  engine(const engine&) = delete;
  engine& operator=(const engine&) = delete;

  /// Runs the body for each item in [0, items). With order_seed 0 threads and items come in order;
  /// otherwise in one that it decides, another for each block. Throws std::logic_error where the
  /// body breaks a rule of blocks; what it wrote is undefined then.
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
      // New memory for each block: in the same, ThreadSanitizer would see blocks race.
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

  // To ThreadSanitizer barriers order all that a crew does; those of two crews do not. They take
  // turns so that some blocks of any distance are not of one crew.
  // Together they leave some of its 255 actors to others. Threads that share an actor in the one
  // crew do not in the other.
  static constexpr int crews = EMULATION_TSAN ? 2 : 1;
  std::unique_ptr<crew> crews_[crews];
  unsigned blocks_ = 0;
};

}  // namespace emulation
