// SPDX-License-Identifier: Apache-2.0
// A program that uses the library as an engine does: prunes one layer's cache and checks what
// stays.
#include <refreekv/refreekv.hpp>
#include <vector>

int main() {
  // 1,000 keys of which only token 600 attracts the query, so the cut falls just before it.
  constexpr std::size_t tokens = 1000, head_dim = 64;
  std::vector<float> query(head_dim, 1.0f), keys(tokens * head_dim), values(tokens * head_dim);
  for (std::size_t d = 0; d < head_dim; ++d) keys[600 * head_dim + d] = 4.0f;
  for (std::size_t t = 0; t < tokens; ++t) values[t * head_dim] = static_cast<float>(t);

  const refreekv::policy::refreekv policy;
  refreekv::thread_pool pool(2);
  const refreekv::cpu_backend cpu{pool};
  const refreekv::dense k(refreekv::view(keys.data(), {1, 1, tokens, head_dim}));
  const refreekv::dense v(refreekv::view(values.data(), {1, 1, tokens, head_dim}));
  const auto layer =
      refreekv::observe(refreekv::view(query.data(), {1, 1, 1, head_dim}), k, {.index = 5});
  std::vector<std::byte> scratch(refreekv::workspace_size(policy, cpu, layer));
  refreekv::kept_range kept;
  const refreekv::status status = refreekv::prune(policy, cpu, layer, refreekv::view(&kept, {1, 1}),
                                                  scratch, refreekv::compaction::suffix_down, v);

  const bool cut = kept.sinks == 4 && kept.cut == 600 && kept.length() == 404;
  const bool moved = keys[4 * head_dim] == 4.0f && values[4 * head_dim] == 600.0f;
  return status == refreekv::status::ok && cut && moved ? 0 : 1;
}
