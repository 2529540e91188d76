// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <algorithm>
#include <limits>
#include <thread>

#include "budget_option.hpp"
#include "command_line.hpp"

namespace evaluate {

namespace {

named_budget budget_of(const std::string& text) {
  if (const auto share = smollm2::parse_share(text)) {
    return {smollm2::percent(*share), *share, nullptr};
  }
  if (const variant* reference = find_adaptive(text)) return {"as much as " + text, 1, reference};
  throw smollm2::usage_error(
      "--budgets: '" + text +
      "' is no share such as 0.5 or 50%, nor a row without a budget such as refreekv or 'refreekv, "
      "threshold 5 %'");
}

}  // namespace

std::optional<options> parse_options(int argc, char** argv) {
  options result;
  result.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  result.limit = std::numeric_limits<std::size_t>::max();
  std::vector<std::string> budgets{"0.9", "0.5", "0.2", "refreekv"};

  CLI::App app(
      "Compares methods that prune a key/value cache: how far each moves a model's predictions.");
  app.option_defaults()->always_capture_default();
  app.add_option("--model", result.model, "a Llama model in GGUF")->required();
  app.add_option("--prompts", result.prompts, "files, and folders of *.txt files");
  app.add_option("--limit", result.limit, "prompts to take, evenly spread over all")
      ->check(CLI::Range(std::size_t{1}, std::numeric_limits<std::size_t>::max()))
      ->default_str("all");
  app.add_option("--pass-keys", result.pass_keys,
                 "prompts to make up, of 1,000 to 3,500 tokens with a five-digit key to find");
  app.add_option("--seed", result.seed, "of those");
  app.add_flag("--question-later", result.question_later,
               "feed the last paragraph of each prompt, its question, after the pruning");
  app.add_option("--methods", result.methods)
      ->check(CLI::IsMember(method_names()))
      ->default_str("all");
  app.add_option("--budgets", budgets,
                 "of the methods that need one: shares of the prompt, or rows without a budget, "
                 "'METHOD' or 'METHOD, OPTIONS', for what they keep of it");
  app.add_option("--tokens", result.tokens, "tokens that the full cache generates to compare at")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20));
  app.add_option(
         "--prune-every", result.prune_every,
         "prune after every so many of these tokens, too, and count what is kept at the end")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20))
      ->default_str("after the prompt only");
  app.add_option("--full-layers", result.full_layers,
                 "first layers that no method prunes, whatever its own rule says");
  app.add_option("--threads", result.threads)->check(CLI::Range(1, 1024));
  app.add_option("--max-tokens", result.max_tokens, "skip prompts that are longer")
      ->default_str("the model's context less --tokens");
  app.add_flag("--raw", result.raw, "take prompts as they are, with no chat template around them");
  app.add_option("--csv", result.csv, "write means and all prompts to this file");
  app.add_option("--json", result.json, "write the same to this file");
  app.add_option("--plot", result.plot, "draw FILE.svg and FILE.png (needs gnuplot)");
  if (!smollm2::parse(app, argc, argv)) return std::nullopt;
  if (result.prompts.empty() && result.pass_keys == 0) {
    throw smollm2::usage_error("--prompts or --pass-keys is required (see --help)");
  }

  if (result.methods.empty()) result.methods = method_names();
  const auto& names = result.methods;
  if (std::find(names.begin(), names.end(), "cake") != names.end()) {
    const std::string others = "; name the others with --methods";
    if (result.full_layers > 0) {
      throw smollm2::usage_error("--full-layers: cake shares its budget among all layers" + others);
    }
    if (result.prune_every > 0) {
      throw smollm2::usage_error("--prune-every: cake prunes a prompt once" + others);
    }
  }
  for (const std::string& text : budgets) result.budgets.push_back(budget_of(text));
  return result;
}

}  // namespace evaluate
