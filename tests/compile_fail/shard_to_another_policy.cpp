// SPDX-License-Identifier: Apache-2.0
// A policy that ranks tokens by attention needs all of a sequence's keys.
// fails with: no matching function for call to 'select
#include <refreekv/refreekv.hpp>

#ifdef REFREEKV_BAD
using policy = refreekv::policy::snapkv;
#else
using policy = refreekv::policy::refreekv;
#endif

refreekv::status decide(const policy& chosen, refreekv::view<const float, 4> queries,
                        const refreekv::shard<refreekv::dense<float>>& keys,
                        const refreekv::decision_of<policy, refreekv::host_memory>& kept) {
  const auto exchange = [](std::uint32_t*, refreekv::index_t) { return refreekv::status::ok; };
  return refreekv::select(chosen, refreekv::cpu_backend{}, refreekv::observe(queries, keys), kept,
                          refreekv::workspace<>{}, exchange);
}
