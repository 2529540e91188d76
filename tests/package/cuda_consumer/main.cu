// SPDX-License-Identifier: Apache-2.0
// Prunes one layer where there is a device; where there is none, the launch must be refused.
#include <cstdio>
#include <refreekv/cuda.cuh>
#if defined(EIGEN_WORLD_VERSION)
#error "the CUDA backend must not include Eigen"
#endif

using namespace refreekv;

int main() {
  constexpr index_t q_heads = 4, kv_heads = 2, tokens = 1000, head_dim = 64;
  int devices = 0;
  const bool has_device = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  float* memory = nullptr;
  if (has_device) cudaMalloc(&memory, size_t{1} << 24);
  float* any = has_device ? memory : reinterpret_cast<float*>(256);  // not looked at on the host
  const dense<float, device_memory> keys(
      view<float, 4, device_memory>(any, {1, kv_heads, tokens, head_dim}));
  const view<const float, 4, device_memory> query(any + (1 << 20), {1, 1, q_heads, head_dim});
  const kept_ranges<device_memory> kept(reinterpret_cast<kept_range*>(any + (2 << 20)), {1, 1});
  const auto layer = observe(query, keys, {.index = 2});
  const policy::refreekv policy;
  const workspace<device_memory> scratch(reinterpret_cast<std::byte*>(any + (3 << 20)),
                                         std::size_t{1} << 22);
  const status s = prune(policy, cuda_backend{}, layer, kept, scratch, compaction::sinks_up);
  std::printf("%d devices: %s\n", devices, to_string(s));
  if (!has_device) return s == status::device_error ? 0 : 1;
  return s == status::ok && cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}
