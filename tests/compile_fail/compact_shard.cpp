// SPDX-License-Identifier: Apache-2.0
// A rank compacts its own tokens, by what local_ranges leaves of the decision.
// fails with: no matching function for call to 'compact
#include <refreekv/refreekv.hpp>

refreekv::status move(const refreekv::shard<refreekv::dense<float>>& keys,
                      refreekv::view<const refreekv::kept_range, 2> kept) {
#ifdef REFREEKV_BAD
  const auto& own = keys;
#else
  const auto& own = keys.source();
#endif
  return refreekv::compact(refreekv::cpu_backend{}, kept, refreekv::compaction::sinks_up, own);
}
