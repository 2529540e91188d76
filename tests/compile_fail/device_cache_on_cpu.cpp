// SPDX-License-Identifier: Apache-2.0
// A backend selects where its memory is.
// fails with: no matching function for call to 'select
#include <refreekv/refreekv.hpp>

#ifdef REFREEKV_BAD
using memory = refreekv::device_memory;
#else
using memory = refreekv::host_memory;
#endif

refreekv::status decide(const refreekv::dense<float, memory>& keys,
                        refreekv::view<refreekv::kept_range, 2, memory> kept) {
  const refreekv::policy::streaming_llm policy;
  const refreekv::cpu_backend cpu;
  return refreekv::select(policy, cpu, refreekv::observe(keys), kept,
                          refreekv::workspace<memory>{});
}
