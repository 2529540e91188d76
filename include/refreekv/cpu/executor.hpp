// SPDX-License-Identifier: Apache-2.0
// Executors: how a CPU backend runs loops in parallel. One thread, the library's pool, or an
// engine's own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <concepts>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "refreekv/core/config.hpp"

namespace refreekv::inline v0 {

/// An executor: runs a function on several workers.
/// - `workers()`: the number of calls that `run` makes. At least 1, and constant.
/// - `run(f)`: calls f(w) once for each w in [0, workers()), and returns when all calls are done.
///   The calls may use any threads and any order, also one after the other. f does not throw. The
///   executor specifies whether several threads may call `run` at the same time.
/// Example: with OpenMP, `#pragma omp parallel for` over w in `run`.
template <class E>
concept executor = requires(const E& e, void (&f)(int)) {
  { e.workers() } -> std::same_as<int>;
  e.run(f);
};

/// Runs all work on the calling thread.
struct single_thread {
  [[nodiscard]] constexpr int workers() const noexcept { return 1; }
  template <class F>
  constexpr void run(const F& f) const noexcept {
    f(0);
  }
};

/// A pool of threads that sleep between runs. Constructing and destroying a pool allocates and may
/// throw; `run` does neither. Any thread may call `run` at any time, also from inside f. The pool's
/// threads serve one run at a time. A run that finds them busy makes all of its calls on the
/// calling thread and does not wait. A run in a child of fork() does so too, because the child has
/// none of the threads.
class thread_pool {
 public:
  /// `threads` includes the calling thread; a value below 1 counts as 1.
  thread_pool(int threads) : thread_pool() {  // delegates: the destructor joins if a thread fails
    for (int w = 1; w < threads; ++w) threads_.emplace_back([this, w] { serve(w); });
  }
  ~thread_pool() {
    if (process_ != this_process()) {  // a forked child can neither join nor detach them
      for (std::thread& t : threads_) std::construct_at(&t);
      return;
    }
    job_ = nullptr;
    publish();
    for (std::thread& t : threads_) t.join();
  }
  thread_pool(const thread_pool&) = delete;
  thread_pool& operator=(const thread_pool&) = delete;

  [[nodiscard]] int workers() const noexcept { return static_cast<int>(threads_.size()) + 1; }

  template <class F>
  void run(const F& f) const noexcept {
    run([](const void* work, int w) { (*static_cast<const F*>(work))(w); }, std::addressof(f));
  }

 private:
  using job = void (*)(const void* work, int worker);

  thread_pool() = default;

  void run(job f, const void* work) const noexcept {
    if (threads_.empty() || process_ != this_process() ||
        busy_.exchange(true, std::memory_order_acquire)) {
      for (int w = 0; w < workers(); ++w) f(work, w);
      return;
    }
    job_ = f;
    work_ = work;
    running_.store(workers() - 1, std::memory_order_relaxed);
    publish();
    f(work, 0);
    for (int left; (left = running_.load(std::memory_order_acquire)) != 0;) running_.wait(left);
    busy_.store(false, std::memory_order_release);
  }

  static long this_process() noexcept {
#if defined(__unix__) || defined(__APPLE__)
    return getpid();
#else
    return 0;  // no fork on this system
#endif
  }

  void publish() const noexcept {
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
  }

  void serve(int w) noexcept {
    for (unsigned last = 0;; ++last) {
      round_.wait(last, std::memory_order_acquire);
      if (job_ == nullptr) return;
      job_(work_, w);
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
    }
  }

  mutable job job_ = nullptr;
  mutable const void* work_ = nullptr;
  mutable std::atomic<unsigned> round_{0};
  mutable std::atomic<int> running_{0};
  mutable std::atomic<bool> busy_{false};
  long process_ = this_process();
  std::vector<std::thread> threads_;
};

/// Returns how many workers get a part of `items` items. for_each_range numbers them from 0.
template <class Executor>
[[nodiscard]] index_t workers_for(const Executor& threads, index_t items) noexcept {
  return std::clamp<index_t>(items, 1, threads.workers());
}

/// Calls f(worker, begin, end) with a part of [0, items) for each worker that has one. These
/// workers are numbered without gaps, so scratch is only needed for workers_for(threads, items)
/// workers.
template <class Executor, class F>
void for_each_range(const Executor& threads, index_t items, const F& f) noexcept {
  const index_t workers = threads.workers();
  threads.run([&](int w) {
    const index_t begin = items * w / workers, end = items * (w + 1) / workers;
    if (begin < end) f(items < workers ? static_cast<int>(begin) : w, begin, end);
  });
}

/// Calls f(worker, item) for every item in [0, items); each worker gets consecutive items.
/// `elements` is roughly the number of elements of all items together. Below 2^16 elements the
/// calling thread does all work: waking a worker takes longer than touching some ten thousand
/// elements.
template <class Executor, class F>
void for_each_item(const Executor& threads, index_t items, index_t elements, const F& f) noexcept {
  const auto all = [&](int w, index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) f(w, i);
  };
  if (items > 1 && elements >= index_t{1} << 16) {
    for_each_range(threads, items, all);
  } else {
    all(0, 0, items);
  }
}

}  // namespace refreekv::inline v0
