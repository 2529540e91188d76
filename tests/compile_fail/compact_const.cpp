// SPDX-License-Identifier: Apache-2.0
// What is compacted can be written.
// fails with: compaction needs a cache that can be written
#include <refreekv/refreekv.hpp>

#ifdef REFREEKV_BAD
using element = const float;
#else
using element = float;
#endif

refreekv::status shorten(const refreekv::dense<element>& values,
                         refreekv::view<const refreekv::kept_range, 2> kept) {
  return refreekv::compact(refreekv::cpu_backend{}, kept, refreekv::compaction::sinks_up, values);
}
