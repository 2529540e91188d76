// SPDX-License-Identifier: Apache-2.0
// The CUDA backend selects in device memory: compiles as it is, and with REFREEKV_BAD must not.
#include "refreekv/cuda.cuh"

#ifdef REFREEKV_BAD
using memory = refreekv::host_memory;
#else
using memory = refreekv::device_memory;
#endif

refreekv::status decide(const refreekv::dense<float, memory>& keys,
                        refreekv::view<refreekv::kept_range, 2, memory> kept) {
  const refreekv::policy::streaming_llm policy;
  const refreekv::cuda_backend gpu;
  return refreekv::select(policy, gpu, refreekv::observe(keys), kept,
                          refreekv::workspace<memory>{});
}
