// SPDX-License-Identifier: Apache-2.0
// Runs SmolLM2 on a prompt and prunes each layer's cache right after that layer's prefill.
#include <iostream>

#include "command_line.hpp"
#include "generation.hpp"
#include "loaded_model.hpp"
#include "options.hpp"
#include "plot.hpp"
#include "progress_bar.hpp"
#include "report.hpp"
#include "resident_memory.hpp"
#include "stopwatch.hpp"

namespace {

using namespace smollm2;

// Keys and values of all slots that hold a token.
std::size_t bytes_in_use(const kv_cache& cache) {
  std::size_t rows = 0;
  for (std::size_t i = 0; i < cache.layers(); ++i) {
    const layer_cache& layer = cache.layer(i);
    for (std::size_t head = 0; head < layer.kv_heads(); ++head) rows += layer.length(head);
  }
  return rows * cache.layer(0).head_dim() * 2 * sizeof(float);
}

decoding_cache decoding(const llama& model, kv_cache& cache) {
  // Any token does: what it costs does not depend on it.
  return {[&] { model.decode(0, cache); }, [&] { return bytes_in_use(cache); }};
}

void run(const options& opts) {
  const loaded_model loaded = load_model(opts.model, opts.threads);
  const llama& model = loaded.network;
  const tokenizer& tokens = loaded.tokens;
  const std::size_t plot_layer = opts.plot_layer.value_or(model.config().layers / 2);
  if (plot_layer >= model.config().layers) {
    throw std::runtime_error("--plot-layer: the model has layers 0 to " +
                             std::to_string(model.config().layers - 1));
  }
  const std::vector<int> prompt = tokens.encode_chat(opts.prompt);

  report result{};
  result.prompt_tokens = prompt.size();
  kv_cache cache = model.new_cache();
  kv_cache full = model.new_cache();  // filled for --compare and --speed only
  pruning_rule rule = opts.rule;
  set_layers(rule, model.config().layers);
  pruner prune(rule, opts.threads);
  loss_picture loss{};

  prefill_hooks hooks;
  hooks.window = window_of(rule);
  double hook_seconds = 0;
  hooks.on_layer = [&](std::size_t layer, std::span<const float> queries, kv_cache& filled) {
    const stopwatch watch;
    if (opts.compare || opts.speed) full.layer(layer) = filled.layer(layer);
    if (!opts.plot.empty() && layer == plot_layer) {
      loss = {layer, std::get<refreekv::policy::refreekv>(rule).threshold,
              prune.loss_curve(layer, queries, filled.layer(layer))};
    }
    result.layers.push_back(prune.prune(layer, queries, filled.layer(layer)));
    hook_seconds += watch.seconds();
  };
  const std::vector<float> logits = [&] {
    progress_bar progress;
    hooks.on_progress = [&](double fraction) { progress.show("prefill", fraction); };
    const stopwatch watch;
    std::vector<float> last = model.prefill(prompt, cache, hooks);
    result.prefill_seconds = watch.seconds() - hook_seconds;
    return last;
  }();

  full.advance(prompt.size());
  if (opts.compare) {
    kv_cache pruned = cache;
    result.against_full = compare(model, generate(model, logits, full, opts.tokens, -1), pruned);
  }
  const generation answer = generate(model, logits, cache, opts.tokens, tokens.end_token());
  result.tokens = answer.tokens;
  result.text = tokens.decode(answer.tokens);
  result.decode_seconds = answer.seconds;
  result.peak_resident_bytes = peak_resident_bytes();
  if (opts.speed) {
    kv_cache half = model.new_cache();
    model.prefill(std::span(prompt).first((prompt.size() + 1) / 2), half);
    result.speed = measure_speed(decoding(model, full), decoding(model, half),
                                 decoding(model, cache), model.weight_bytes(), opts.threads);
  }

  print(result, std::cout);
  if (!opts.json.empty()) write_json(result, opts.json);
  if (!opts.plot.empty()) draw(result, loss, opts.plot);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("smollm2", [&] {
    if (const auto opts = parse_options(argc, argv)) run(*opts);
  });
}
