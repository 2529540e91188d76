// SPDX-License-Identifier: Apache-2.0
#include "decoding_speed.hpp"

#include <span>

#include "decoding.hpp"

namespace paged {

decoding_speed measure_speed(const smollm2::llama& model, const serving_plan& plan, int threads,
                             const progress& on_progress) {
  const smollm2::llama_config& config = model.config();
  const std::span<const int> prompt(plan.a), first_half = prompt.first((prompt.size() + 1) / 2);
  smollm2::require_room_for_speed(prompt.size(), 0, config.context);
  const std::size_t tokens = prompt.size() + smollm2::speed_tokens;
  const page_shape page{plan.page_tokens, config.kv_heads, config.head_dim};
  page_pool pool(page, 3 * config.layers * page.pages_for(tokens));
  const auto admit = [&] { return paged_cache::admit(pool, config.layers, tokens).value(); };
  paged_cache full = admit(), half = admit(), pruned = admit();

  decoding_speed result{};
  const auto hooks = pruning_hooks(plan.policy, config.q_heads, result.releases);
  model.prefill(prompt, pruned,
                {.window = hooks.window,
                 .on_layer =
                     [&](std::size_t layer, std::span<const float> queries, paged_cache& cache) {
                       full.layer(layer).assign(cache.layer(layer));
                       hooks.on_layer(layer, queries, cache);
                     },
                 .on_progress = [&](double fraction) { on_progress("prefill of A", fraction); }});
  full.advance(prompt.size());
  model.prefill(first_half, half, {.on_progress = [&](double fraction) {
                  on_progress("prefill of its half", fraction);
                }});
  result.test = smollm2::measure_speed(decoding(model, full), decoding(model, half),
                                       decoding(model, pruned), model.weight_bytes(), threads);
  return result;
}

}  // namespace paged
