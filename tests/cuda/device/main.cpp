// SPDX-License-Identifier: Apache-2.0
// Runs the tests where there is a device, with managed memory for all that they allocate; returns
// 77 where there is none. Tests of all backends pass what is on the stack, too: those run where a
// device reaches all of the host's memory.
#define CATCH_CONFIG_RUNNER
#include <cuda_runtime.h>

#include <cstdlib>
#include <new>

#include "catch.hpp"

namespace {

bool has_device() {
  static const bool has = [] {
    int devices = 0;
    return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  }();
  return has;
}

}  // namespace

void* operator new(std::size_t bytes) {
  void* memory = nullptr;
  if (!has_device()) {
    memory = std::malloc(bytes);
  } else if (cudaMallocManaged(&memory, bytes > 0 ? bytes : 1) != cudaSuccess) {
    memory = nullptr;
  }
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept {
  if (has_device()) {
    cudaFree(memory);
  } else {
    std::free(memory);
  }
}
void operator delete(void* memory, std::size_t) noexcept { operator delete(memory); }

int main(int argc, char** argv) {
  if (!has_device()) {
    std::puts("no CUDA device: nothing was tested");
    return 77;
  }
  int reaches_stack = 0;
  cudaDeviceGetAttribute(&reaches_stack, cudaDevAttrPageableMemoryAccess, 0);
  Catch::Session session;
  if (const int error = session.applyCommandLine(argc, argv); error != 0) return error;
  if (reaches_stack == 0) {
    std::puts("the device does not reach the host's stack: only [cuda] tests run");
    session.configData().testsOrTags.push_back("[cuda]");
  }
  return session.run();
}
