// SPDX-License-Identifier: Apache-2.0
// Policies that read values read keys as rows.
// fails with: values belong to keys that are rows of floats
#include <refreekv/refreekv.hpp>

namespace r = refreekv;

auto valued(r::view<const float, 4> queries, const r::dense<r::q8_0_block>& blocks,
            const r::dense<float>& rows) {
#ifdef REFREEKV_BAD
  return r::with_values(r::observe(queries, r::block_keys{blocks}), rows);
#else
  (void)blocks;
  return r::with_values(r::observe(queries, rows), rows);
#endif
}
