// SPDX-License-Identifier: Apache-2.0
// Attention is computed from float, half and bfloat16.
// fails with: keys are float, half or bfloat16
#include <refreekv/refreekv.hpp>

#ifdef REFREEKV_BAD
using element = double;
#else
using element = float;
#endif

refreekv::status decide(refreekv::view<element, 4> queries, const refreekv::dense<element>& keys,
                        refreekv::view<refreekv::kept_range, 2> kept,
                        refreekv::workspace<> scratch) {
  const refreekv::policy::refreekv policy;
  const refreekv::cpu_backend cpu;
  return refreekv::select(policy, cpu, refreekv::observe(queries, keys), kept, scratch);
}
