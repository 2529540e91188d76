// SPDX-License-Identifier: Apache-2.0
// What the device is, as far as tests and times depend on it. Returns 77 where there is none.
#include <cstdio>

int main() {
  int devices = 0, driver = 0, runtime = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::printf("no CUDA device: %s\n", cudaGetErrorString(error));
    return 77;
  }
  cudaDeviceProp properties{};
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) return 1;
  std::printf("%s, %d.%d, %zu MB; driver %d, runtime %d\n", properties.name, properties.major,
              properties.minor, properties.totalGlobalMem >> 20, driver, runtime);
  const struct {
    const char* name;
    cudaDeviceAttr attribute;
  } rows[] = {
      {"multiprocessors", cudaDevAttrMultiProcessorCount},
      {"multiprocessor clock, kHz", cudaDevAttrClockRate},
      {"memory clock, kHz", cudaDevAttrMemoryClockRate},
      {"second level cache, bytes", cudaDevAttrL2CacheSize},
      {"shared memory of a multiprocessor, bytes", cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {"reaches pageable memory", cudaDevAttrPageableMemoryAccess},
      {"reaches managed memory beside the host", cudaDevAttrConcurrentManagedAccess}};
  for (const auto& row : rows) {
    int value = -1;
    cudaDeviceGetAttribute(&value, row.attribute, 0);
    std::printf("%s: %d\n", row.name, value);
  }
  return 0;
}
