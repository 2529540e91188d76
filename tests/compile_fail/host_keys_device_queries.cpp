// SPDX-License-Identifier: Apache-2.0
// Queries and keys live in the same memory.
// fails with: no matching function for call to 'observe
#include <refreekv/refreekv.hpp>

#ifdef REFREEKV_BAD
using query_memory = refreekv::device_memory;
#else
using query_memory = refreekv::host_memory;
#endif

auto see(refreekv::view<float, 4, query_memory> queries, refreekv::dense<float> keys) {
  return refreekv::observe(queries, keys);
}
