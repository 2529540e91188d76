// SPDX-License-Identifier: Apache-2.0
// The least that an engine does: one call for each layer, right after that layer's prefill.
#include <cstdio>
#include <refreekv/refreekv.hpp>
#include <vector>

int main() {
  constexpr int q_heads = 32, kv_heads = 8, tokens = 1000, head_dim = 128;
  std::vector<float> K(kv_heads * tokens * head_dim), V(K.size()), Q(q_heads * head_dim);
  // In place of a prefill: attention of the last token falls with distance, as exp(-x / 100).
  for (int i = 0; i < kv_heads * tokens; ++i) K[i * head_dim] = 0.01f * (i % tokens);
  for (int h = 0; h < q_heads; ++h) Q[h * head_dim] = 11.3137f;  // sqrt(head_dim)

  refreekv::policy::refreekv policy;  // 1 % of the norm may go; 4 sinks, first 2 layers stay
  refreekv::cpu_backend cpu;          // or cpu_backend{2}, or {pool}: the engine's own executor
  refreekv::dense keys(refreekv::view(K.data(), {1, kv_heads, tokens, head_dim}));
  refreekv::dense values(refreekv::view(V.data(), {1, kv_heads, tokens, head_dim}));
  refreekv::view last_query(Q.data(), {1, 1, q_heads, head_dim});
  auto layer = refreekv::observe(last_query, keys, {.index = 7});

  std::vector<std::byte> scratch(refreekv::workspace_size(policy, cpu, layer));
  refreekv::kept_range kept;
  auto mode = refreekv::compaction::sinks_up;
  auto status = refreekv::prune(policy, cpu, layer, {&kept, {1, 1}}, scratch, mode, values);
  if (status != refreekv::status::ok) return std::puts(refreekv::to_string(status)), 1;

  std::printf("%d of %d tokens stay, in slots %d to %d; the next position is %d\n", kept.length(),
              tokens, int(first_slot(kept, mode)), tokens - 1, kept.next_position());
}
