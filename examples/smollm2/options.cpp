// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <thread>

#include "command_line.hpp"
#include "files.hpp"
#include "rule_options.hpp"

namespace smollm2 {

std::optional<options> parse_options(int argc, char** argv) {
  options result;
  rule_options rule;
  std::string text, question;
  std::filesystem::path prompt_file;
  result.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));

  CLI::App app(
      "Runs SmolLM2 with a key/value cache that refreekv prunes after each layer's prefill.");
  app.option_defaults()->always_capture_default();
  app.add_option("--model", result.model, "a Llama model in GGUF")->required();
  auto* source = app.add_option_group("prompt")->require_option(1);
  source->add_option("--prompt", text, "the prompt's text");
  source->add_option("--prompt-file", prompt_file, "a file with the prompt's text");
  app.add_option("--question", question, "text to append to the prompt");
  app.add_option("--tokens", result.tokens, "tokens to generate")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20));
  app.add_option("--threads", result.threads)->check(CLI::Range(1, 1024));
  app.add_flag("--compare", result.compare,
               "measure against the unpruned cache over the tokens that it generates");
  app.add_option("--json", result.json, "write all results to this file");
  app.add_option("--plot", result.plot, "draw FILE.svg and FILE.png (needs gnuplot)");
  app.add_option("--plot-layer", result.plot_layer,
                 "layer whose loss curve is drawn (default: the middle one)");
  rule.add_to(app);
  if (!parse(app, argc, argv)) return std::nullopt;

  result.rule = rule.rule();
  if (!result.plot.empty() && !std::holds_alternative<refreekv::policy::refreekv>(result.rule)) {
    throw usage_error("--plot needs --policy refreekv");
  }
  result.prompt = prompt_file.empty() ? text : read_file(prompt_file);
  if (!question.empty()) result.prompt += "\n\n" + question;
  return result;
}

}  // namespace smollm2
