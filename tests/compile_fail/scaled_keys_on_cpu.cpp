// SPDX-License-Identifier: Apache-2.0
// Keys of 8 bits with scales are read by the CUDA backend.
// fails with: 8-bit scaled_keys are read by
#include <refreekv/refreekv.hpp>

namespace r = refreekv;

r::status decide(r::view<const float, 4> queries, const r::dense<float>& rows,
                 const r::dense<float>& scales, r::view<r::kept_range, 2> kept,
                 r::workspace<> scratch) {
#ifdef REFREEKV_BAD
  const r::scaled_keys keys{rows, scales};
#else
  (void)scales;
  const r::dense<float>& keys = rows;
#endif
  return r::select(r::policy::refreekv{}, r::cpu_backend{}, r::observe(queries, keys, {.index = 7}),
                   kept, scratch);
}
