// SPDX-License-Identifier: Apache-2.0
// A block manager of the kind that vLLM has, around the SmolLM2 engine: a pruned sequence returns
// pages, and another one is admitted into them.
#include <iostream>
#include <optional>

#include "command_line.hpp"
#include "loaded_model.hpp"
#include "options.hpp"
#include "progress_bar.hpp"
#include "report.hpp"

namespace {

void run(const paged::options& opts) {
  const smollm2::loaded_model model = smollm2::load_model(opts.model, opts.threads);
  const auto encode = [&](const std::string& text) { return model.tokens.encode_chat(text); };
  const paged::serving_plan plan{encode(opts.a), encode(opts.b),   encode(opts.c),
                                 opts.tokens,    opts.page_tokens, opts.policy};
  std::optional<smollm2::progress_bar> bar(std::in_place);
  const auto show = [&](const std::string& phase, double fraction) { bar->show(phase, fraction); };
  if (opts.speed) {
    const auto speed = paged::measure_speed(model.network, plan, opts.threads, show);
    bar.reset();  // ends its line
    return print(speed, std::cout);
  }
  const paged::serving_result result = paged::serve(model.network, plan, show);
  bar.reset();
  print(result, model.tokens, std::cout);
  if (const char* wrong = result.wrong()) throw std::runtime_error(wrong);
}

}  // namespace

int main(int argc, char** argv) {
  return smollm2::run_program("paged", [&] {
    if (const auto opts = paged::parse_options(argc, argv)) run(*opts);
  });
}
