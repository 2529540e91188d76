// SPDX-License-Identifier: Apache-2.0
// Runs the tests of every backend on a device: all that they allocate, and their stack, is
// page-locked memory of the host, which has the same address on the device. Stacks of threads that
// a test starts are not: those hand over what is allocated.
#include <cuda_runtime.h>
#include <pthread.h>

#include <cstdio>
#include <cstdlib>
#include <new>

#include "arena.hpp"
#include "session.hpp"

namespace {

constexpr std::size_t stack_bytes = std::size_t{64} << 20;
constexpr std::size_t heap_bytes = std::size_t{256} << 20;  // the tests need less than a third

constinit arena heap;

void* allocate(std::size_t bytes, std::size_t alignment) {
  void* memory = nullptr;
  if (heap.open()) {
    memory = heap.take(bytes > alignment ? bytes : alignment);
    if (memory == nullptr) std::fprintf(stderr, "no room in the arena for %zu bytes\n", bytes);
  } else {
    memory = std::aligned_alloc(alignment, (bytes / alignment + 1) * alignment);
  }
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void release(void* memory) noexcept {
  if (heap.holds(memory)) {
    heap.give(memory);
  } else {
    std::free(memory);
  }
}

/// One block of both, or null.
std::byte* pinned_memory() {
  void *memory = nullptr, *there = nullptr;
  const cudaError_t error = cudaHostAlloc(&memory, stack_bytes + heap_bytes, cudaHostAllocDefault);
  if (error != cudaSuccess) {
    std::fprintf(stderr, "page-locked memory: %s\n", cudaGetErrorString(error));
    return nullptr;
  }
  if (cudaHostGetDevicePointer(&there, memory, 0) != cudaSuccess || there != memory) {
    std::fputs("page-locked memory has another address on the device\n", stderr);
    return nullptr;
  }
  return static_cast<std::byte*>(memory);
}

struct call {
  int argc;
  char** argv;
  int result;
};

void* run(void* argument) {
  call& c = *static_cast<call*>(argument);
  c.result = run_tests(c.argc, c.argv);
  return nullptr;
}

}  // namespace

// The other forms call these.
void* operator new(std::size_t bytes) { return allocate(bytes, alignof(std::max_align_t)); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { release(memory); }
void operator delete(void* memory, std::size_t) noexcept { release(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { release(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { release(memory); }

int main(int argc, char** argv) {
  if (!has_device()) return skipped;
  std::byte* const memory = pinned_memory();
  if (memory == nullptr) return 1;
  heap.begin(memory + stack_bytes, heap_bytes);

  call tests{argc, argv, 1};
  pthread_attr_t attributes;
  pthread_t thread;
  if (pthread_attr_init(&attributes) != 0 ||
      pthread_attr_setstack(&attributes, memory, stack_bytes) != 0 ||
      pthread_create(&thread, &attributes, run, &tests) != 0) {
    std::fputs("no thread on page-locked memory\n", stderr);
    return 1;
  }
  pthread_join(thread, nullptr);
  heap.close();
  std::printf("page-locked memory: %zu of %zu MB\n", heap.peak() >> 20, heap_bytes >> 20);
  return tests.result;
}
