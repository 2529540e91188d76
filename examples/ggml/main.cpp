// SPDX-License-Identifier: Apache-2.0
// Runs a Llama model on ggml and prunes each layer's cache right after that layer's prefill.
#include <iostream>

#include "command_line.hpp"
#include "ggml/llama.hpp"
#include "ggml/pruning.hpp"
#include "greedy.hpp"
#include "progress_bar.hpp"
#include "report.hpp"
#include "resident_memory.hpp"
#include "run_options.hpp"
#include "stopwatch.hpp"
#include "tokenizer.hpp"

namespace {

using namespace ggml_engine;
using namespace smollm2;

decode_step steps_of(llama& model, kv_cache& cache) {
  return [&](int token) { return model.decode(token, cache); };
}

decoding_cache decoding(llama& model, kv_cache& cache) {
  // Any token does: what it costs does not depend on it.
  return {[&] { model.decode(0, cache); }, [&] { return cache.bytes_in_use(); }};
}

void run(const run_settings& opts) {
  const gguf_file file(opts.model);
  const tokenizer tokens(file);
  llama model(file, opts.threads);
  const std::vector<int> prompt = tokens.encode_chat(opts.prompt);
  if (opts.speed) require_room_for_speed(prompt.size(), opts.tokens, model.config().context);

  report result{};
  result.prompt_tokens = prompt.size();
  kv_cache cache = model.new_cache();
  kv_cache full = model.new_cache();  // filled for --compare and --speed only
  pruning_policy policy = opts.policy;
  set_layers(policy, model.config().layers);
  pruner prune(policy, model.config(), opts.threads);

  prefill_hooks hooks;
  hooks.window = window_of(policy);
  double hook_seconds = 0;
  hooks.on_layer = [&](std::size_t layer, std::span<const float> queries, layer_cache& filled) {
    const stopwatch watch;
    if (opts.compare || opts.speed) full.layers[layer] = filled.copy();
    result.layers.push_back(prune.prune(layer, queries, filled));
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

  const std::size_t count = std::min(opts.tokens, model.config().context - cache.next_position + 1);
  full.next_position = prompt.size();
  if (opts.compare) {
    kv_cache pruned = cache.copy();
    result.against_full =
        compare(generate(steps_of(model, full), logits, count, -1), steps_of(model, pruned));
  }
  const generation answer = generate(steps_of(model, cache), logits, count, tokens.end_token());
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
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("ggml", [&] {
    CLI::App app("Runs a Llama model on ggml; refreekv prunes each layer after its prefill.");
    run_options options;
    options.add_to(app);
    if (!parse(app, argc, argv)) return;
    const run_settings opts = options.settings();
    if (const char* reason = why_unsuitable(opts.policy)) throw usage_error(reason);
    run(opts);
  });
}
