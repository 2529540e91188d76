// SPDX-License-Identifier: Apache-2.0
// A shard's decision needs what other ranks have found.
// fails with: no matching function for call to 'select
#include <refreekv/refreekv.hpp>

refreekv::status decide(refreekv::view<const float, 4> queries,
                        const refreekv::shard<refreekv::dense<float>>& keys,
                        const refreekv::kept_ranges<>& kept) {
  const auto exchange = [](std::uint32_t*, refreekv::index_t) { return refreekv::status::ok; };
  const refreekv::single_rank none;
#ifdef REFREEKV_BAD
  const auto& join = none;
#else
  const auto& join = exchange;
#endif
  (void)exchange, (void)none;
  return refreekv::select(refreekv::policy::refreekv{}, refreekv::cpu_backend{},
                          refreekv::observe(queries, keys), kept, refreekv::workspace<>{}, join);
}
