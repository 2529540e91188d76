// SPDX-License-Identifier: Apache-2.0
// Runs SmolLM2 on a prompt and prunes each layer's cache right after that layer's prefill.
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <iostream>

#include "generation.hpp"
#include "options.hpp"
#include "plot.hpp"
#include "report.hpp"
#include "tokenizer.hpp"

namespace {

using namespace smollm2;

void show_progress(double fraction) {
  if (!isatty(STDERR_FILENO)) return;
  constexpr int width = 40;
  const int done = static_cast<int>(fraction * width);
  std::fprintf(stderr, "\rprefill [%.*s%*s] %3d %%%s", done,
               "########################################", width - done, "",
               static_cast<int>(100 * fraction), fraction < 1 ? "" : "\n");
}

std::size_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::size_t>(usage.ru_maxrss) * 1024;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void run(const options& opts) {
  const auto [model, tokens] = [&] {
    const gguf_file file(opts.model);
    return std::pair(llama(file, opts.threads), tokenizer(file));
  }();
  const std::size_t plot_layer = opts.plot_layer.value_or(model.config().layers / 2);
  if (plot_layer >= model.config().layers) {
    throw std::runtime_error("--plot-layer: the model has layers 0 to " +
                             std::to_string(model.config().layers - 1));
  }
  const std::vector<int> prompt = tokens.encode_chat(opts.prompt);

  report result{};
  result.prompt_tokens = prompt.size();
  kv_cache cache = model.new_cache();
  kv_cache full = model.new_cache();  // filled for --compare only
  pruner prune(opts.rule, opts.threads);
  loss_picture loss{};

  prefill_hooks hooks;
  hooks.window = window_of(opts.rule);
  hooks.on_progress = show_progress;
  double hook_seconds = 0;
  hooks.on_layer = [&](std::size_t layer, std::span<const float> queries, kv_cache& filled) {
    const auto start = std::chrono::steady_clock::now();
    if (opts.compare) full.layer(layer) = filled.layer(layer);
    if (!opts.plot.empty() && layer == plot_layer) {
      loss = {layer, std::get<refreekv::policy::refreekv>(opts.rule).threshold,
              prune.loss_curve(layer, queries, filled.layer(layer))};
    }
    result.layers.push_back(prune.prune(layer, queries, filled.layer(layer)));
    hook_seconds += seconds_since(start);
  };
  const auto start = std::chrono::steady_clock::now();
  const std::vector<float> logits = model.prefill(prompt, cache, hooks);
  result.prefill_seconds = seconds_since(start) - hook_seconds;

  if (opts.compare) {
    full.advance(prompt.size());
    kv_cache pruned = cache;
    result.against_full = compare(model, generate(model, logits, full, opts.tokens, -1), pruned);
  }
  const generation answer = generate(model, logits, cache, opts.tokens, tokens.end_token());
  result.tokens = answer.tokens;
  result.text = tokens.decode(answer.tokens);
  result.decode_seconds = answer.seconds;
  result.peak_resident_bytes = peak_resident_bytes();

  print(result, std::cout);
  if (!opts.json.empty()) write_json(result, opts.json);
  if (!opts.plot.empty()) draw(result, loss, opts.plot);
}

}  // namespace

int main(int argc, char** argv) {
  int exit_code = 0;
  const auto opts = parse_options(argc, argv, exit_code);
  if (!opts) return exit_code;
  try {
    run(*opts);
  } catch (const std::exception& error) {
    std::cerr << "smollm2: " << error.what() << '\n';
    return 1;
  }
}
