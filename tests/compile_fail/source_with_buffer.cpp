// SPDX-License-Identifier: Apache-2.0
// Rows are read where they are: many are located before any is read.
// fails with: a source describes memory that stays where it is
#include <refreekv/refreekv.hpp>

namespace r = refreekv;

struct gathered_keys {
  using memory = r::host_memory;
  using element_type = const float;
  const float* data;
  r::index_t tokens_here, dim;
#ifdef REFREEKV_BAD
  mutable std::vector<float> row;
#endif
  r::cache_shape shape() const { return {1, 1, tokens_here, dim}; }
  r::index_t tokens(r::index_t) const { return tokens_here; }
  const char* invalid() const { return nullptr; }
  r::token_run<const float> run_at(r::index_t, r::index_t, r::index_t t) const {
#ifdef REFREEKV_BAD
    row.assign(data + t * dim, data + (t + 1) * dim);
    return {row.data(), 1, dim, 1};
#else
    return {data + t * dim, tokens_here - t, dim, 1};
#endif
  }
};

auto see(r::view<const float, 4> queries, const gathered_keys& keys) {
  return r::observe(queries, keys, {.index = 7});
}
