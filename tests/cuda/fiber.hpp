// SPDX-License-Identifier: Apache-2.0
// A stack that a thread can switch to, and what sanitizers must be told when it does.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#if defined(__has_feature)
#define EMULATION_HAS(sanitizer) __has_feature(sanitizer)
#else
#define EMULATION_HAS(sanitizer) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || EMULATION_HAS(address_sanitizer)
#define EMULATION_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define EMULATION_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__) || EMULATION_HAS(thread_sanitizer)
#define EMULATION_TSAN 1
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
#else
#define EMULATION_TSAN 0
#endif

// swapcontext asks the kernel for the signal mask at each switch, which takes longer than all else.
#if defined(__x86_64__)
#define EMULATION_ASSEMBLY 1
#else
#define EMULATION_ASSEMBLY 0
#endif

namespace emulation {

/// What ThreadSanitizer learns: a fiber does what it does as an actor, ordered by nothing but
/// these.
namespace race_detector {

#if EMULATION_TSAN
inline void release(void* fence) noexcept { __tsan_release(fence); }
inline void acquire(void* fence) noexcept { __tsan_acquire(fence); }
inline void look_away() noexcept { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }  // writes, too
inline void look_again() noexcept { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#else
inline void release(void*) noexcept {}
inline void acquire(void*) noexcept {}
inline void look_away() noexcept {}
inline void look_again() noexcept {}
#endif

/// A thread to ThreadSanitizer. From LLVM 14 on it tells 255 of them apart; with more, those that
/// were not seen for long pass for others, and most races go unnoticed.
class actor {
 public:
  actor() noexcept {
#if EMULATION_TSAN
    handle_ = __tsan_create_fiber(0);
#endif
  }
  /// What it did is ordered before what comes next.
  ~actor() {
#if EMULATION_TSAN
    void* const self = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(handle_, 0);
    __tsan_switch_to_fiber(self, 0);
    __tsan_destroy_fiber(handle_);
#endif
  }
  actor(const actor&) = delete;
  actor& operator=(const actor&) = delete;

#if EMULATION_TSAN
  [[nodiscard]] void* handle() const noexcept { return handle_; }

 private:
  void* handle_;
#endif
};

/// As long as it lives, the fiber's reads and writes are not looked at.
struct unobserved {
  unobserved() noexcept { look_away(); }
  ~unobserved() { look_again(); }
  unobserved(const unobserved&) = delete;
  unobserved& operator=(const unobserved&) = delete;
};

}  // namespace race_detector

/// Something that a thread can leave and come back to. Fibers stay with the thread that made them.
class fiber {
 public:
  /// The stack that the calling thread is on.
  fiber() noexcept {
#if EMULATION_TSAN
    tsan_ = __tsan_get_current_fiber();
#endif
  }
  /// `run(argument)` on another stack, as soon as it is switched to. It must not return, and is
  /// abandoned with the fiber. Fibers may share an actor: nothing of theirs is a race, then.
  fiber([[maybe_unused]] const race_detector::actor& as, std::byte* stack, std::size_t bytes,
        void (*run)(void*), void* argument)
      : run_(run), argument_(argument) {
#if EMULATION_ASAN
    stack_ = stack;
    bytes_ = bytes;
    __asan_unpoison_memory_region(stack, bytes);  // of frames that were abandoned on it
#endif
#if EMULATION_TSAN
    tsan_ = as.handle();
#endif
#if EMULATION_ASSEMBLY
    // What change_stack takes from it: six registers and where to go on. Where a function starts,
    // 8 bytes are on an aligned stack.
    auto* const top = reinterpret_cast<std::uintptr_t*>(stack + bytes / 16 * 16) - 1;
    *top = 0;
    top[-1] = reinterpret_cast<std::uintptr_t>(enter);
    std::fill(top - 7, top - 1, std::uintptr_t{0});
    context_ = top - 7;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, enter, 0);
#endif
  }
  fiber(const fiber&) = delete;
  fiber& operator=(const fiber&) = delete;

  /// Leaves this fiber, which is running, for `next`; returns when something switches back. Both
  /// sides are unobserved.
  void switch_to(fiber& next) noexcept {
    left_ = this;
    entered_ = &next;
#if EMULATION_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, next.stack_, next.bytes_);
#endif
    race_detector::look_again();
#if EMULATION_TSAN
    __tsan_switch_to_fiber(next.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if EMULATION_ASSEMBLY
    change_stack(&context_, next.context_);
#else
    swapcontext(&context_, &next.context_);
#endif
    race_detector::look_away();
#if EMULATION_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  static void enter() {
    race_detector::look_away();
    fiber& self = *entered_;
#if EMULATION_ASAN  // the only way to learn where the thread's own stack is
    __sanitizer_finish_switch_fiber(nullptr, &left_->stack_, &left_->bytes_);
#endif
    self.run_(self.argument_);
  }

  static inline constinit thread_local fiber* left_ = nullptr;
  static inline constinit thread_local fiber* entered_ = nullptr;

#if EMULATION_ASSEMBLY
  /// Leaves the registers that a call keeps on the stack, its address in *left, for another stack.
  __attribute__((naked, noinline)) static void change_stack(void** /*left*/, void* /*entered*/) {
    asm("pushq %rbp\n\t"
        "pushq %rbx\n\t"
        "pushq %r12\n\t"
        "pushq %r13\n\t"
        "pushq %r14\n\t"
        "pushq %r15\n\t"
        "movq %rsp, (%rdi)\n\t"
        "movq %rsi, %rsp\n\t"
        "popq %r15\n\t"
        "popq %r14\n\t"
        "popq %r13\n\t"
        "popq %r12\n\t"
        "popq %rbx\n\t"
        "popq %rbp\n\t"
        "ret");
  }
  void* context_ = nullptr;
#else
  ucontext_t context_;
#endif
  void (*run_)(void*) = nullptr;
  void* argument_ = nullptr;
#if EMULATION_ASAN
  const void* stack_ = nullptr;
  std::size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
#endif
#if EMULATION_TSAN
  void* tsan_ = nullptr;
#endif
};

}  // namespace emulation
