// SPDX-License-Identifier: Apache-2.0
// Scales belong to keys of 8 bits.
// fails with: scaled_keys of int8 or fp8
#include <refreekv/refreekv.hpp>

namespace r = refreekv;

#ifdef REFREEKV_BAD
using element = float;
#else
using element = std::int8_t;
#endif

r::status decide(r::view<const float, 4> queries, const r::dense<element>& rows,
                 const r::dense<float>& scales, r::view<r::kept_range, 2> kept,
                 r::workspace<> scratch) {
  const r::scaled_keys keys{rows, scales};
  return r::select(r::policy::refreekv{}, r::cpu_backend{}, r::observe(queries, keys, {.index = 7}),
                   kept, scratch);
}
