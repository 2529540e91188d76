// SPDX-License-Identifier: Apache-2.0
#include "run_options.hpp"

#include <thread>

#include "files.hpp"

namespace smollm2 {

void run_options::add_to(CLI::App& app) {
  given_.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  app.option_defaults()->always_capture_default();
  app.add_option("--model", given_.model, "a Llama model in GGUF")->required();
  auto* source = app.add_option_group("prompt")->require_option(1);
  source->add_option("--prompt", given_.prompt, "the prompt's text");
  source->add_option("--prompt-file", prompt_file_, "a file with the prompt's text");
  app.add_option("--question", question_, "text to append to the prompt");
  app.add_option("--tokens", given_.tokens, "tokens to generate")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20));
  app.add_option("--threads", given_.threads)->check(CLI::Range(1, 1024));
  app.add_flag("--compare", given_.compare,
               "measure against the unpruned cache over the tokens that it generates");
  app.add_flag("--speed", given_.speed,
               "measure tokens/s, full and pruned, in alternating runs, and what they could be");
  app.add_option("--json", given_.json, "write all results to this file");
  policies_.add_to(app);
}

run_settings run_options::settings() const {
  run_settings result = given_;
  result.policy = policies_.chosen();
  if (!prompt_file_.empty()) result.prompt = read_file(prompt_file_);
  if (!question_.empty()) result.prompt += "\n\n" + question_;
  return result;
}

}  // namespace smollm2
