// SPDX-License-Identifier: Apache-2.0
// A stack that a thread can switch to, with the calls that sanitizers need at each switch.
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

// swapcontext makes a system call for the signal mask at each switch, which would dominate the run.
#if defined(__x86_64__)
#define EMULATION_ASSEMBLY 1
#else
#define EMULATION_ASSEMBLY 0
#endif

namespace emulation {

/// Annotations for ThreadSanitizer. It sees the memory accesses of a fiber as those of an actor;
/// only release and acquire order actors.
namespace race_detector {

#if EMULATION_TSAN
inline void release(void* fence) noexcept { __tsan_release(fence); }
inline void acquire(void* fence) noexcept { __tsan_acquire(fence); }
inline void look_away() noexcept { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }  // and writes
inline void look_again() noexcept { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#else
inline void release(void*) noexcept {}
inline void acquire(void*) noexcept {}
inline void look_away() noexcept {}
inline void look_again() noexcept {}
#endif

/// A thread, as ThreadSanitizer sees it. From LLVM 14 on it can distinguish 255 of them. With more,
/// it reuses the identities of actors that were idle for long, and misses most races.
class actor {
 public:
  actor() noexcept {
#if EMULATION_TSAN
    handle_ = __tsan_create_fiber(0);
#endif
  }
  /// Orders all accesses of the actor before everything that follows.
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

/// While it exists, ThreadSanitizer ignores the fiber's reads and writes.
struct unobserved {
  unobserved() noexcept { look_away(); }
  ~unobserved() { look_again(); }
  unobserved(const unobserved&) = delete;
  unobserved& operator=(const unobserved&) = delete;
};

}  // namespace race_detector

/// A flow of execution that a thread can suspend and resume. A fiber must only run on the thread
/// that made it.
class fiber {
 public:
  /// The fiber of the calling thread's own stack.
  fiber() noexcept {
#if EMULATION_TSAN
    tsan_ = __tsan_get_current_fiber();
#endif
  }
  /// Calls run(argument) on another stack at the first switch to this fiber. Requires that run does
  /// not return; the destructor abandons it. Fibers that share an actor never race.
  fiber([[maybe_unused]] const race_detector::actor& as, std::byte* stack, std::size_t bytes,
        void (*run)(void*), void* argument)
      : run_(run), argument_(argument) {
#if EMULATION_ASAN
    stack_ = stack;
    bytes_ = bytes;
    __asan_unpoison_memory_region(stack, bytes);  // poisoned by abandoned frames
#endif
#if EMULATION_TSAN
    tsan_ = as.handle();
#endif
#if EMULATION_ASSEMBLY
    // The frame that change_stack pops: six registers and a return address. At function entry
    // rsp + 8 must be aligned to 16 bytes.
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

  /// Suspends this fiber and resumes `next`. Returns when another fiber switches back. Requires
  /// that this fiber is running, and that both fibers are unobserved at the switch.
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
#if EMULATION_ASAN  // only this call tells where the thread's own stack is
    __sanitizer_finish_switch_fiber(nullptr, &left_->stack_, &left_->bytes_);
#endif
    self.run_(self.argument_);
  }

  static inline constinit thread_local fiber* left_ = nullptr;
  static inline constinit thread_local fiber* entered_ = nullptr;

#if EMULATION_ASSEMBLY
  /// Pushes the callee-saved registers, writes the stack pointer to *left, and pops those of
  /// `entered`.
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
