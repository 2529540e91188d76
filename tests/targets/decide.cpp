// SPDX-License-Identifier: Apache-2.0
// Decisions of one object of a program whose objects are compiled for different instruction sets,
// as engines do that choose one at run time. OBJECT is the name of this one's function.
#include "decide.hpp"

#include <refreekv/refreekv.hpp>

namespace r = refreekv;

decisions OBJECT(const float* keys, const float* queries, long tokens, long head_dim) {
  constexpr r::index_t kv_heads = 2, q_heads = 8, window = 3;
  const r::dense source(r::view<const float, 4>(keys, {1, kv_heads, tokens, head_dim}));
  const auto layer = r::observe(r::view<const float, 4>(queries, {1, window, q_heads, head_dim}),
                                source, {.index = 7, .attention = {.soft_cap = 30}});
  const r::cpu_backend cpu;
  std::vector<std::byte> scratch;
  decisions out;

  const r::policy::refreekv range{.window = window, .average = r::row_average::frobenius};
  scratch.resize(r::workspace_size(range, cpu, layer));
  r::kept_range kept;
  if (r::select(range, cpu, layer, {&kept, {1, 1}}, scratch) != r::status::ok) return out;
  out.cut = kept.cut;

  const r::policy::h2o scores{.budget = tokens / 2, .window = window};
  scratch.resize(r::workspace_size(scores, cpu, layer));
  out.positions.resize(static_cast<std::size_t>(kv_heads * tokens));
  r::kept_tokens counts[kv_heads];
  if (r::select(scores, cpu, layer,
                r::kept_positions<>{{out.positions.data(), {1, kv_heads, tokens}},
                                    {counts, {1, kv_heads}}},
                scratch) != r::status::ok) {
    out.cut = -1;
  }
  return out;
}
