// SPDX-License-Identifier: Apache-2.0
#include "fake_runtime.hpp"

#include <cstring>

using fake_runtime::made;

namespace {

cudaError_t note(const char* function, cudaError_t result = cudaSuccess) {
  ++made.counts[function];
  return result;
}

}  // namespace

// NOLINTBEGIN: the runtime's names
extern "C" {

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  made.blocks.push_back(config->gridDim.x);
  return note("cudaLaunchKernelExC");
}
// What CUB launches by, in one version or another.
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, std::size_t, cudaStream_t) {
  return note("cudaLaunchKernel");
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, std::size_t, cudaStream_t) {
  return note("cudaLaunchKernel");
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void*) {
  *kernel = nullptr;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void*, int, std::size_t, cudaStream_t) {
  return note("cudaMemsetAsync");
}

cudaError_t cudaPeekAtLastError() { return note("cudaPeekAtLastError", made.last); }
cudaError_t cudaGetLastError() {
  const cudaError_t last = made.last;
  made.last = cudaSuccess;
  return note("cudaGetLastError", last);
}

// A device of compute capability 9.0.
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return note("cudaGetDeviceCount");
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return note("cudaGetDevice");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    default: *value = 1 << 16;
  }
  return note("cudaDeviceGetAttribute");
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return note("cudaFuncGetAttributes");
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                   std::size_t, unsigned) {
  *blocks = 2;
  return note("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                          std::size_t) {
  *blocks = 2;
  return note("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
}

// What no verb may do.
cudaError_t cudaMalloc(void**, std::size_t) { return note("cudaMalloc"); }
cudaError_t cudaMallocAsync(void**, std::size_t, cudaStream_t) { return note("cudaMallocAsync"); }
cudaError_t cudaFree(void*) { return note("cudaFree"); }
cudaError_t cudaMemcpy(void*, const void*, std::size_t, cudaMemcpyKind) {
  return note("cudaMemcpy");
}
cudaError_t cudaMemcpyAsync(void*, const void*, std::size_t, cudaMemcpyKind, cudaStream_t) {
  return note("cudaMemcpyAsync");
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return note("cudaStreamSynchronize"); }
cudaError_t cudaDeviceSynchronize() { return note("cudaDeviceSynchronize"); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return note("cudaEventSynchronize"); }

}  // extern "C"
// NOLINTEND
